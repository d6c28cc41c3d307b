"""vtp.runtime: opens a bundle and answers prompts about pictures. Imports neither torch nor transformers."""

from vtp.engines import UsageError, VtpError
from vtp.runtime.bundle.folder import Bundle, open_bundle
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.decisions.decision import Decision
from vtp.runtime.generation.turn import Busy
from vtp.runtime.media.pictures import NO_PICTURE, Images
from vtp.runtime.pipeline import Pipeline, Stream
from vtp.runtime.prompt.messages import Messages
from vtp.runtime.result import Result, Timings, TokenLogprob, VisualTokens
from vtp.runtime.transformers_api.model import VtpForImageTextToText

__all__ = [
    "NO_PICTURE",
    "Bundle",
    "Busy",
    "Decision",
    "Images",
    "Manifest",
    "Messages",
    "Pipeline",
    "Result",
    "Stream",
    "Timings",
    "TokenLogprob",
    "UsageError",
    "VisualTokens",
    "VtpError",
    "VtpForImageTextToText",
    "open_bundle",
]
