"""The whole graph text before and after merging and pruning, for one tiny model each."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tests.check import Check


class Mean(nn.Module):
    """Residual attention and a residual linear layer, twice, and the mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.up = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            h = self.qk(x).unsqueeze(1)
            x = x + scaled_dot_product_attention(h, h, h).squeeze(1)
            x = x + self.up(x)
        return x.mean(1)


class Class(nn.Module):
    """A class token ahead of the tokens, one block as above; the output is the class token's."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.up = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.cls = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        h = self.qk(x).unsqueeze(1)
        x = x + scaled_dot_product_attention(h, h, h).squeeze(1)
        return (x + self.up(x))[:, 0]


MEAN = """
x[batch, 6, 4]
linear[batch, 6, 4] = linear(x, @qk.weight)
unsqueeze[batch, 1, 6, 4] = unsqueeze(linear, 1)
scaled_dot_product_attention[batch, 1, 6, 4] =
    scaled_dot_product_attention(unsqueeze, unsqueeze, unsqueeze)
squeeze[batch, 6, 4] = squeeze(scaled_dot_product_attention, 1)
add[batch, 6, 4] = add(x, squeeze)
linear_1[batch, 6, 4] = linear(add, @up.weight)
add_1[batch, 6, 4] = add(add, linear_1)
linear_2[batch, 6, 4] = linear(add_1, @qk.weight)
unsqueeze_1[batch, 1, 6, 4] = unsqueeze(linear_2, 1)
scaled_dot_product_attention_1[batch, 1, 6, 4] =
    scaled_dot_product_attention(unsqueeze_1, unsqueeze_1, unsqueeze_1)
squeeze_1[batch, 6, 4] = squeeze(scaled_dot_product_attention_1, 1)
add_2[batch, 6, 4] = add(add_1, squeeze_1)
linear_3[batch, 6, 4] = linear(add_2, @up.weight)
add_3[batch, 6, 4] = add(add_2, linear_3)
mean[batch, 4] = mean(add_3, [1])
return mean
"""

MEAN_MERGED = """
x[batch, 6, 4]
linear[batch, 6, 4] = linear(x, @qk.weight)
unsqueeze[batch, 1, 6, 4] = unsqueeze(linear, 1)
scaled_dot_product_attention[batch, 1, 6, 4] =
    scaled_dot_product_attention(unsqueeze, unsqueeze, unsqueeze)
squeeze[batch, 6, 4] = squeeze(scaled_dot_product_attention, 1)
add[batch, 6, 4] = add(x, squeeze)
select_int[batch, 6] = select(add, 2, 0)
ones_like_default[batch, 6] = ones_like(select_int, dtype=torch.float32)
mean_dim[batch, 6, 4] = mean(unsqueeze, [1])
match_tokens_default = match_tokens(mean_dim, ones_like_default, 2, 4, 0, 0, False)
getitem[batch, 4] = getitem(match_tokens_default, 0)
getitem_1[batch, 2] = getitem(match_tokens_default, 1)
getitem_2[batch, 2] = getitem(match_tokens_default, 2)
merge_tokens_default =
    merge_tokens(add, ones_like_default, getitem, getitem_1, getitem_2)
getitem_3[batch, 4] = getitem(merge_tokens_default, 1)
getitem_4[batch, 4, 4] = getitem(merge_tokens_default, 0)
linear_1[batch, 4, 4] = linear(getitem_4, @up.weight)
add_1[batch, 4, 4] = add(getitem_4, linear_1)
linear_2[batch, 4, 4] = linear(add_1, @qk.weight)
unsqueeze_1[batch, 1, 4, 4] = unsqueeze(linear_2, 1)
log_default[batch, 4] = log(getitem_3)
unsqueeze_default[batch, 1, 4] = unsqueeze(log_default, 1)
log_size_1[batch, 1, 1, 4] = unsqueeze(unsqueeze_default, 2)
scaled_dot_product_attention_1[batch, 1, 4, 4] =
    scaled_dot_product_attention(unsqueeze_1, unsqueeze_1, unsqueeze_1, log_size_1)
squeeze_1[batch, 4, 4] = squeeze(scaled_dot_product_attention_1, 1)
add_2[batch, 4, 4] = add(add_1, squeeze_1)
linear_3[batch, 4, 4] = linear(add_2, @up.weight)
add_3[batch, 4, 4] = add(add_2, linear_3)
unsqueeze_default_1[batch, 4, 1] = unsqueeze(getitem_3, 2)
mul_tensor[batch, 4, 4] = mul(add_3, unsqueeze_default_1)
sum_dim_int_list[batch, 4] = sum(mul_tensor, [1], False)
sum_dim_int_list_1[batch, 1] = sum(unsqueeze_default_1, [1], False)
clamp_min_default[batch, 1] = clamp_min(sum_dim_int_list_1, 1e-06)
div_tensor[batch, 4] = div(sum_dim_int_list, clamp_min_default)
return div_tensor
"""


def test_merging_weighs_attention_and_the_mean_by_size() -> None:
    (
        Check(Mean(), torch.randn(2, 6, 4))
        .normal()
        .before(MEAN)
        .run("merge-tokens{r=2,sites=[0]}")
        .after(MEAN_MERGED)
        .noted("block 0: 6 -> 4 tokens")
    )


CLASS = """
x[batch, 6, 4]
sym_size_int_1 = sym_size(x, 0)
expand[batch, 1, 4] = expand(@cls, [sym_size_int_1, -1, -1])
cat[batch, 7, 4] = cat([expand, x], 1)
linear[batch, 7, 4] = linear(cat, @qk.weight)
unsqueeze[batch, 1, 7, 4] = unsqueeze(linear, 1)
scaled_dot_product_attention[batch, 1, 7, 4] =
    scaled_dot_product_attention(unsqueeze, unsqueeze, unsqueeze)
squeeze[batch, 7, 4] = squeeze(scaled_dot_product_attention, 1)
add[batch, 7, 4] = add(cat, squeeze)
linear_1[batch, 7, 4] = linear(add, @up.weight)
add_1[batch, 7, 4] = add(add, linear_1)
select[batch, 4] = select(add_1, 1, 0)
return select
"""

CLASS_PRUNED = """
x[batch, 6, 4]
sym_size_int_1 = sym_size(x, 0)
expand[batch, 1, 4] = expand(@cls, [sym_size_int_1, -1, -1])
cat[batch, 7, 4] = cat([expand, x], 1)
linear[batch, 7, 4] = linear(cat, @qk.weight)
unsqueeze[batch, 1, 7, 4] = unsqueeze(linear, 1)
scaled_dot_product_attention[batch, 1, 7, 4] =
    scaled_dot_product_attention(unsqueeze, unsqueeze, unsqueeze)
squeeze[batch, 7, 4] = squeeze(scaled_dot_product_attention, 1)
add[batch, 7, 4] = add(cat, squeeze)
select_int[batch, 7] = select(add, 2, 0)
ones_like_default[batch, 7] = ones_like(select_int, dtype=torch.float32)
attention_row_default[batch, 7] =
    attention_row(unsqueeze, unsqueeze, None, ones_like_default, [0], 0.5, False)
select_tokens_default[batch, 4] = select_tokens(attention_row_default, 4, 1, 0)
gather_tokens_default[batch, 4, 4] = gather_tokens(add, select_tokens_default, 1)
linear_1[batch, 4, 4] = linear(gather_tokens_default, @up.weight)
add_1[batch, 4, 4] = add(gather_tokens_default, linear_1)
select[batch, 4] = select(add_1, 1, 0)
return select
"""


def test_pruning_keeps_what_the_class_token_attends_to() -> None:
    (
        Check(Class(), torch.randn(2, 6, 4))
        .normal()
        .before(CLASS)
        .run("prune-tokens{keep=0.5,sites=[0]}")
        .after(CLASS_PRUNED)
        .noted("block 0: 7 -> 4 tokens")
    )
