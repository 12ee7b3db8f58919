"""Failures that are known, by pattern of label (with its area), each with its reason.

A list to be emptied: an entry that covers no failure any more fails the slow tier.
"""

KNOWN: dict[str, tuple[str, str]] = {}
