"""Triton's interpreter without what it does again at every call of a device function."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def patched_once() -> Iterator[None]:
    """The interpreter replaces every function of `tl` when a launch begins. It does so again whenever the kernel calls a device
    function, although the functions of the launch still stand there: this took 40% of the time of these tests.
    """
    if not hasattr(interpreter, "_LangPatchScope"):  # another Triton than the one that `make test` installs
        yield
        return
    patch_lang = interpreter._patch_lang

    def patch_lang_once(kernel: Any) -> Any:
        seen = [module for module in (tl, tl.core) if any(value is module for value in kernel.__globals__.values())]
        if any(tl.core.is_builtin(module.load) for module in seen):
            return patch_lang(kernel)
        return interpreter._LangPatchScope()  # nothing to restore

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_lang_once)
        yield
