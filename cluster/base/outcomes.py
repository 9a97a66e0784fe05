"""What can become of a row of a URL list: the closed sets that code, commits and metrics share.

A row is stored, filtered (it could be had and is left out on purpose) or failed (it was attempted
and could not be had). Commits count rows as "stored", "filtered:REASON" and "failed:REASON".
"""

OUTCOMES = ("stored", "filtered", "failed")
FAILED = (
    "invalid_url", "unresolved", "address_refused", "port_refused", "tls_failed", "too_large",
    "too_many_redirects", "not_found", "forbidden", "client_error", "not_an_image", "undecodable",
    "no_image", "no_image_bytes", "bad_caption", "duplicate_member", "malformed_row",
    "hash_mismatch", "unreachable", "timeout", "truncated", "rate_limited", "server_error",
    "robots_unavailable", "resolver_failed", "no_network", "shard_deadline",
)  # fmt: skip
# Failures that may pass: the try is repeated, and so is the row by --retry-failed.
TRANSIENT = frozenset(FAILED[FAILED.index("unreachable") :])
FILTERED = (
    "opted_out", "robots_disallowed", "too_small", "too_many_pixels", "too_few_pixels",
    "aspect_ratio", "opt_out_list", "forgotten", "duplicate_url", "duplicate_image", "no_hash",
    "low_similarity", "low_aesthetic", "unsafe", "watermarked", "nsfw", "language", "null_score",
    "short_caption", "long_caption", "few_tokens", "many_tokens", "no_caption", "hidden_file",
    "link_refused", "other_file",
)  # fmt: skip
# In a commit's counts, "retried:REASON": rows of a round of retries, which an earlier shard counted
# as "failed:REASON".
RETRIED = "retried"


def status_of(reason: str) -> str:
    """Return whether a row with `reason` is "failed" or "filtered"."""
    return "filtered" if reason in FILTERED else "failed"
