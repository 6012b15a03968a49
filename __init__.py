"""What ComfyUI imports: node mappings and the folder of the front end's files. Its server gets the panel's routes, its
input folder the saved workflows' pictures, and the sidecar of a ComfyUI that has just ended is kept for this one."""

import sys
from pathlib import Path

if sys.platform != "linux":
    raise ImportError(f"ComfyUI-ParallelDiT needs Linux, and this is {sys.platform}. On Windows, run ComfyUI in WSL2.")

try:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
except ModuleNotFoundError as error:
    if error.name is None or error.name.startswith(__name__):
        raise
    requirements = Path(__file__).resolve().parent / "requirements.txt"
    raise ModuleNotFoundError(
        f"ComfyUI-ParallelDiT needs the Python package {error.name!r}, which this Python does not have. "
        f"Install the pack's requirements: {sys.executable} -m pip install -r {requirements}",
        name=error.name,
    ) from error

if "comfy.model_management" in sys.modules:
    from .nodes import host

    def _comfy_host() -> host.Host:
        from .nodes.comfyui.host import ComfyHost

        return ComfyHost()

    host.install(_comfy_host)

_server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
if _server is not None:
    from .nodes import example_pictures
    from .nodes.panel import origin, routes
    from .nodes.session import session

    _names = origin.own_names(sys.modules["comfy.cli_args"].args.listen)
    routes.register(_server.routes, _server.send_sync, _names)
    example_pictures.provide(Path(sys.modules["folder_paths"].get_input_directory()))
    session.inherit()

WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
