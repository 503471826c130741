"""``python -m llava_vlora`` is the command ``llava-vlora``."""

from __future__ import annotations

from .cli import main

raise SystemExit(main())
