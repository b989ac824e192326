"""What travels in `replica_state` beside a volume's manifest: the baseline, the snapshot that has the same content.

It is bound to the manifest by a digest, so that a baseline is never used with a manifest that it was not stored with.
A state holds no secrets but those that the manifest keeps in `chunks`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..model import Json

STATE = "replica_state"
VHD = "vhd_url"  # of a volume in Blob storage
BLANK = "zeroed"
_BASELINE, _CHECK = "baseline", "check"
# What an entry holds of ours, or what is only true of a volume at one moment.
_NO_DESCRIPTION = frozenset({STATE, VHD, BLANK})


def with_baseline(state: Json, baseline: Json | None) -> Json:
    """The state, with a baseline that holds exactly what its manifest says."""
    if baseline is None:
        return state
    return {**state, _BASELINE: {**baseline, _CHECK: _bound(state, baseline)}}


def baseline_in(state: Any) -> Json | None:
    """The baseline in a state; None if there is none, or if it was changed or belongs to another manifest."""
    kept = state.get(_BASELINE) if isinstance(state, dict) else None
    if not isinstance(kept, dict):
        return None
    baseline = {name: value for name, value in kept.items() if name != _CHECK}
    try:
        return baseline if kept.get(_CHECK) == _bound(state, baseline) else None
    except RecursionError:  # nobody has nested it so deeply who has bound it
        return None


def has_baseline(state: Any) -> bool:
    """Whether a state names any baseline, rightly or not."""
    return isinstance(state, dict) and _BASELINE in state


def description(entry: Json) -> str:
    """A digest of what the destination says of a volume: all of its entry but what it has from us."""
    words = {name: value for name, value in entry.items() if name not in _NO_DESCRIPTION}
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]


def _bound(state: Json, baseline: Json) -> str:
    """The digest that binds a baseline to a manifest, which the manifest's own check value stands for."""
    text = json.dumps([state.get(_CHECK), baseline], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=14).hexdigest()
