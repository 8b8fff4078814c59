"""The blocks that a model is stacked from, found without knowing its family.

A stack is an outermost `nn.ModuleList` whose elements are made of modules themselves: `model.layers`, `transformer.h`,
`encoder.layer`, both stacks of an encoder-decoder, those of vision and of language. Lists of heads or of tables are
none. What lies in no block (embeddings, the last norm, the head) surrounds them.
"""

from __future__ import annotations

from torch import nn

from rankworks.core.errors import ConfigError, did_you_mean


def stacked_blocks(model: nn.Module, stack: str | None = None) -> dict[str, nn.Module]:
    """Return {name: block} of all stacks in the model's order, or of the children of the module `stack`.

    stack: a module's name or the end of it. Raises `ConfigError` where there is none.
    """
    if stack is not None:
        named = {name: m for name, m in model.named_modules() if name == stack or name.endswith("." + stack)}
        if not named:
            known = [name for name, module in model.named_modules() if _is_stack(module)]
            raise ConfigError(f"the model has no module {stack!r} to take blocks from.{did_you_mean(stack, known)}")
    else:
        named = {name: module for name, module in model.named_modules() if _is_stack(module)}
    found: dict[str, nn.Module] = {}
    for name, module in named.items():
        if not any(name.startswith(block + ".") for block in found):  # a list within a block, as of experts
            found |= {f"{name}.{i}".removeprefix("."): child for i, child in module.named_children()}
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no list of blocks: name the module whose children are to be taken in turn."
        )
    return found


def _is_stack(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or not len(module):
        return False
    return all(any(True for _ in child.children()) and any(True for _ in child.parameters()) for child in module)
