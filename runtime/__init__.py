"""vtp.runtime: opens a bundle and answers prompts about pictures. Imports neither torch nor transformers."""

from vtp.engines import UsageError, VtpError
from vtp.runtime.bundle.folder import Bundle, open_bundle
from vtp.runtime.bundle.manifest import Manifest
from vtp.runtime.decisions.decision import Decision
from vtp.runtime.media.pictures import NO_PICTURE
from vtp.runtime.pipeline import Pipeline, Stream
from vtp.runtime.result import Result, Timings, TokenLogprob, VisualTokens
from vtp.runtime.transformers_api.model import VtpForImageTextToText

__all__ = [
    "NO_PICTURE",
    "Bundle",
    "Decision",
    "Manifest",
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
