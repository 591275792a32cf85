"""The oracle: what paged attention means, in float64, as plainly as it can be written.

Imports torch only. `paged_attention` and `write_kv` are the whole interface for callers that
hold a paged cache; `attend` is the same arithmetic for one request with its keys in order.
"""

from reference.attention import Attended, attend
from reference.paged import gather_kv, paged_attention, write_kv
from reference.visibility import visible

__all__ = ["Attended", "attend", "gather_kv", "paged_attention", "visible", "write_kv"]
