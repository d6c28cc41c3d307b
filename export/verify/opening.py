"""The least that is held of a bundle that nothing else is compared with: every graph opens."""

from __future__ import annotations

from vtp.engines import VtpError, judge_engines
from vtp.runtime.bundle.folder import Bundle

__all__ = ["open_each"]

_ENGINE = "ort-cpu"  # on which bundles of every target are verified


def open_each(bundle: Bundle) -> bool:
    """Open every graph on ONNX Runtime's CPU provider, one after the other; False where there is none.

    Weights are not copied, so that this takes little memory for a model of any size. Raises VtpError for a
    graph that does not open.
    """
    if not any(one.accepted for one in judge_engines() if one.engine == _ENGINE):
        return False
    for file in bundle.manifest.graphs:
        _open(bundle, file)
    return True


def _open(bundle: Bundle, file: str) -> None:
    from vtp.engines.ort.session import check_opens

    try:
        check_opens(bundle.path(file))
    except VtpError as error:
        raise VtpError(f"{file} does not open on ONNX Runtime, so no bundle is written: {error}") from error
