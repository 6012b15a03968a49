"""ControlNets beside a model: the nets, their files, and where their residuals go."""
