"""The log: one JSON object a line on standard error, with fields that a machine can read."""

from __future__ import annotations

import json
import logging

_log = logging.getLogger("superserve")


def log_event(event: str, level: int = logging.INFO, cause: Exception | None = None, /, **fields: object) -> None:
    """Log something that happened, with fields that a machine can read."""
    _log.log(level, event, exc_info=cause, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and the fields given to ``log_event``."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record."""
        line = {"time": self.formatTime(record), "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def start_log() -> None:
    """Write the log of this process to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
