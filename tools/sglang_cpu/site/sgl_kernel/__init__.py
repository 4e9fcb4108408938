"""What SGLang 0.5.23 imports from its compiled CPU kernels, which PyPI does not carry.

One function has a body in torch; every other name raises when it is called, so nothing is silently
left out. The torch_native attention and the PyTorch sampler call none of them.
"""

from typing import Any

__version__ = "0.4.10"  # the least that SGLang 0.5.23 accepts


def assign_req_to_token_pool_cpu(
    req_pool_indices: Any, req_to_token: Any, start_offset: Any, end_offset: Any, out_cache_loc: Any, pool_len: int
) -> None:
    """Write each request's new cache slots into its row of the table."""
    begin = 0
    bounds = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in bounds:
        count = end - start
        req_to_token[row, start:end] = out_cache_loc[begin : begin + count].to(req_to_token.dtype)
        begin += count


def _missing(name: str) -> Any:
    def raise_it(*_args: Any, **_kwargs: Any) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} exists only in builds for AMX CPUs and GPUs")

    return raise_it


copy_all_layer_kv_cache_cpu = _missing("copy_all_layer_kv_cache_cpu")
rotate_input_ids_cpu = _missing("rotate_input_ids_cpu")
fill_accept_out_cache_loc_cpu = _missing("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _missing("fill_bonus_tokens_cpu")
assign_draft_cache_locs_contiguous_cpu = _missing("assign_draft_cache_locs_contiguous_cpu")
assign_extend_cache_locs_cpu = _missing("assign_extend_cache_locs_cpu")
build_tree_kernel_efficient_cpu = _missing("build_tree_kernel_efficient_cpu")
verify_tree_greedy_cpu = _missing("verify_tree_greedy_cpu")
