"""Tables as the papers have them: full precision first, then method by method at each number of bits."""

import pandas as pd

ORDER = ["fp16", "rtn", "gptq", "quantease", "gptq_quantease"]  # others follow by name


def comparison(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a run: perplexities, relative layer error and bits per weight, of the runs that are done."""
    done = frame.loc[frame["status"] == "done"]
    texts = [column for column in frame.columns if column.startswith("ppl/")]
    rank = [ORDER.index(name) if name in ORDER else len(ORDER) for name in done["method"]]
    sort = done.assign(rank=rank, quantized=done["method"] != "fp16").sort_values(
        ["model", "quantized", "bits", "rank", "method"], ascending=[True, True, False, True, True]
    )
    table = pd.DataFrame(
        {"model": sort["model"], "bits": sort["bits"].map(lambda b: "" if pd.isna(b) else str(int(b)))}
    )
    table["method"] = sort["method"]
    table["bits per weight"] = sort["bits_per_weight"].map("{:.2f}".format)
    for text in texts:
        table[text.removeprefix("ppl/")] = sort[text].map("{:.2f}".format)
    error = sort["layers/mean_relative_error"]
    table["relative layer error"] = error.map("{:.4f}".format).where(sort["quantized"], "")
    return table.reset_index(drop=True)


def markdown(table: pd.DataFrame) -> str:
    """A table in GitHub's Markdown, numbers to the right."""
    words = ("model", "method")
    return table.to_markdown(
        index=False, disable_numparse=True, colalign=["left" if name in words else "right" for name in table.columns]
    )
