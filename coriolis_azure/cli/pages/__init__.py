"""HTML pages: one about replicas (`status --html`), one about runs (`replicate --report`).

A page is one file, without scripts, that fetches nothing. `graphics` computes the shapes of its maps and timelines,
`templates/` has the markup, where everything is escaped by jinja2 and text from others is cleaned before.
"""

from __future__ import annotations

from .page import of_replicas, of_runs

__all__ = ["of_replicas", "of_runs"]
