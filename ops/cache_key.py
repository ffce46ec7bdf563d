"""Compiled graphs in PyTorch's caches are found again only by the rules that made them.

A compiled graph holds what the Python rules of an operator (derivatives, vmap, autocast, fakes, tags) did while it was
traced, but PyTorch's caches know an operator by its name alone: after an upgrade of this package they would serve the
gradients of the old formulas, without a word (https://github.com/pytorch/pytorch/issues/144344). So the sources of the
rules become part of the key, through `torch.compiler.config.cache_key_tag`. Kernels stay out: no graph holds them.
"""

from __future__ import annotations

import hashlib
import pkgutil

from torch.compiler import config

RULES = ("operator.py", "rules.py", "derivatives.py", "recurrent_step.py", "sharding.py", "private.py")


def _fingerprint() -> str:
    package = __package__ or ""
    sources = [pkgutil.get_data(package, name) for name in RULES]
    sources.append(pkgutil.get_data(package.rpartition(".")[0], "checks.py"))
    return hashlib.blake2b(b"\0".join(source or b"" for source in sources), digest_size=8).hexdigest()


def mark(name: str) -> None:
    """Adds "name=fingerprint" to the tag, behind what the user has set there."""
    entry = f"{name}={_fingerprint()}"
    if entry not in config.cache_key_tag.split():
        config.cache_key_tag = f"{config.cache_key_tag} {entry}".strip()
