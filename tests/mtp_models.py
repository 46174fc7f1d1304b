"""Models of the zoo with a layer of multi-token prediction, under the names that repositories have."""

from __future__ import annotations

import re
from pathlib import Path

from zoo import Shape, write_zoo, zoo_config, zoo_shapes
from zoo_specs import SPECS

NAMES = ("qwen3next", "qwen3.5", "qwen3.5-moe", "glm4moe")


def mtp_shapes(name: str) -> dict[str, Shape]:
    """Return the names and shapes of a model's layer of multi-token prediction: its last layer with attention, again.

    Qwen has it beside the model's layers, GLM after them.
    """
    config, shapes = zoo_config(name), zoo_shapes(name)
    width, n_layers = config["hidden_size"], config["num_hidden_layers"]
    layers = [re.match(r"model\.layers\.(\d+)\.self_attn\.q_proj\.weight", key) for key in shapes]
    prefix = f"model.layers.{max(int(match[1]) for match in layers if match)}."
    layer = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    vector, square, table = (width,), (width, 2 * width), (config["vocab_size"], width)
    if name == "glm4moe":
        own = {"eh_proj": square, "enorm": vector, "hnorm": vector, "embed_tokens": table}
        own |= {"shared_head.head": table, "shared_head.norm": vector}
        after = f"model.layers.{n_layers}."
        return {f"{after}{key}": shape for key, shape in layer.items()} | {
            f"{after}{key}.weight": shape for key, shape in own.items()
        }
    own = {"fc": square, "pre_fc_norm_embedding": vector, "pre_fc_norm_hidden": vector, "norm": vector}
    return {f"mtp.layers.0.{key}": shape for key, shape in layer.items()} | {
        f"mtp.{key}.weight": shape for key, shape in own.items()
    }


def write_mtp(folder: Path, name: str) -> Path:
    """Write the folder of a model with its layer of multi-token prediction, and return it."""
    config, key = zoo_config(name), "num_nextn_predict_layers" if name == "glm4moe" else "mtp_num_hidden_layers"
    write_zoo(folder, SPECS[name], {**config, key: 1}, {**zoo_shapes(name), **mtp_shapes(name)})
    return folder
