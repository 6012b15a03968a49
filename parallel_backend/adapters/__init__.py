"""Adapters in the ranks: LoRAs, ControlNets and IP-Adapters, from files or the graph, added to a rank's layers."""
