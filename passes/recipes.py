"""Recipes: named specs, as data. A published system is one row."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Recipe:
    """A spec with a name. `$option` in the spec is filled from `options`, or as the user says.

    The steps of an `optional` recipe are left out, with the reason in the report, where a model
    does not take them; the others were asked for by name and refuse.
    """

    name: str
    spec: str
    summary: str
    source: str
    optional: bool = False
    options: dict[str, str] = field(default_factory=dict)


NORMAL_FORM = (
    "canonicalize,fold-constants,unify-layers,unify-attention,simplify-masks,"
    "canonicalize,fold-constants,split-constants"
)
"""Exact passes that every pipeline begins with; the lossy ones read their form."""

ROWS = (
    Recipe("exact", "", "the normal form alone: outputs stay the same", "effopt"),
    Recipe(
        "balanced",
        "merge-tokens{r=0.33,sites=[0.15,0.4]}",
        "two merge sites; less than 1 point lost on the digits example",
        "effopt, measured on examples/digits",
        optional=True,
    ),
    Recipe(
        "fast",
        "merge-tokens{r=0.45,sites=[0.0,0.3,0.6]}",
        "three merge sites at nearly the largest rate; 0.5 points lost on the digits example",
        "effopt, measured on examples/digits",
        optional=True,
    ),
    Recipe(
        "tome",
        "merge-tokens{r=$r}",
        "token merging in every block",
        "Bolya et al. 2022, arXiv 2210.09461",
        options={"r": "8"},
    ),
    Recipe(
        "evit",
        "prune-tokens{keep=$keep,fuse=$fuse}",
        "tokens that the class token ignores leave at 1/4, 1/2 and 3/4 of the depth",
        "Liang et al. 2022, arXiv 2202.07800",
        options={"keep": "0.7", "fuse": "true"},
    ),
    Recipe(
        "small",
        "quantize{scheme=int4-rtn}",
        "4-bit weights: the smallest file that needs no data",
        "effopt",
        optional=True,
    ),
    Recipe(
        "awq",
        "quantize{scheme=int4-awq,group=$group}",
        "4-bit weights, scales and clipping by what flows through the model; needs data",
        "Lin et al. 2023, arXiv 2306.00978",
        options={"group": "128"},
    ),
    Recipe(
        "gptq",
        "quantize{scheme=int4-gptq,group=$group}",
        "4-bit weights, rounded with error feedback; needs data",
        "Frantar et al. 2022, arXiv 2210.17323",
        options={"group": "128"},
    ),
    Recipe(
        "smoothquant",
        "quantize{scheme=int8-static,alpha=$alpha}",
        "8-bit weights and activations, outliers moved into the weights; needs data",
        "Xiao et al. 2022, arXiv 2211.10438",
        options={"alpha": "auto"},
    ),
)

RECIPES = {row.name: row for row in ROWS}
