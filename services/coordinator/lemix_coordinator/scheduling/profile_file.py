"""Profiles as files: read and written by `lemix_common.profile_file`, since workers and `lemix up` read them too."""

from __future__ import annotations

from lemix_common.profile_file import (
    SCHEMA,
    parse_profile,
    profile_from,
    profile_object,
    read_profile,
    write_profile,
)

__all__ = ["SCHEMA", "parse_profile", "profile_from", "profile_object", "read_profile", "write_profile"]
