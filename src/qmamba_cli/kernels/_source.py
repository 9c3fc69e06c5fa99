"""Kernel sources: read from the package, our own headers inlined as text.

Inlining keeps everything that decides a kernel's machine code in one string, so that a compile cache keyed by
the source sees an edited header, no include path is needed, and packages inside an archive work.
"""

import re
from functools import cache
from importlib.resources import files

# One level, on purpose: our headers include none of ours.
_OWN_INCLUDE = re.compile(r'^[ \t]*#include[ \t]+"(?P<header>[\w.]+)"[ \t]*$', re.MULTILINE)

# Contraction is off so that both backends round the same expressions alike; kernels write fmaf themselves.
COMPILE_OPTIONS = ("--std=c++17", "--fmad=false")

# Sources that use what one architecture alone has, with the target that NVRTC needs for it.
SPECIAL_TARGETS = {f"linear/linear_{name}.cu": "sm_90a" for name in ("narrow", "short", "wide")}
# Sources that run everywhere and use more where their target has it.
BETTER_TARGETS = {"decode_batch/decode_batch.cu": "sm_90a"}


def target_of(relative_path: str, arch: str) -> str:
    """What NVRTC is to compile a kernel for, given the architecture of a GPU as in ``sm_90``."""
    better = BETTER_TARGETS.get(relative_path, "")
    return SPECIAL_TARGETS.get(relative_path) or (better if better.removesuffix("a") == arch else arch)


@cache
def kernel_source(relative_path: str) -> str:
    """The text of a kernel with our headers inlined and line markers that keep error messages true.

    Args:
        relative_path: below ``qmamba_cli/kernels``, as in ``hadamard/hadamard.cu``.
    """
    package = files("qmamba_cli.kernels")
    source = package.joinpath(relative_path).read_text(encoding="utf-8")

    def inline(match: re.Match[str]) -> str:
        line_after = source.count("\n", 0, match.start()) + 2
        text = package.joinpath(match["header"]).read_text(encoding="utf-8")
        return f'#line 1 "{match["header"]}"\n{text}\n#line {line_after} "{relative_path}"'

    return f'#line 1 "{relative_path}"\n' + _OWN_INCLUDE.sub(inline, source)
