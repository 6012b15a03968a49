"""ControlNets of a model: the nets, their files, and the blocks that their residuals are added behind."""
