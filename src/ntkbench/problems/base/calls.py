"""Reduction of a model, its inputs and its chosen outputs and parameters to a module of one tensor and its theta.

The rest of the library only knows ``module(x)`` with one tensor x ``[N, ...]``. Several inputs become buffers of a
:class:`ntkbench.problems.base.adapter.Calling`, and x holds sample indices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from ntkbench.errors import BadInput, one_line
from ntkbench.problem import Problem, Weights
from ntkbench.problems.base.adapter import Calling, Structure, own_name
from ntkbench.problems.base.module import SECOND, generators_restored, same_samples, unusual, unwrapped
from ntkbench.problems.base.sequences import same_inputs

NO_BATCH = "the DataLoader gives no batch"

Call = Callable[[nn.Module, Any], Any]
"""``(model, inputs) -> outputs``, with the inputs of some samples."""


def as_module(model: nn.Module, inputs: Any, call: Call | None = None, output: Any = None) -> tuple[nn.Module, Tensor]:
    """A module of one tensor, and that tensor, for a model, its inputs and its calling convention.

    A single tensor without ``call`` and ``output`` is returned unchanged, with the model.

    Args:
        model: any module; it is not copied here.
        inputs: a tensor; a tuple, list, dict, other mapping or registered pytree of tensors that share their first
            axis, the samples; or a ``DataLoader``, whose batches are joined on the host. A ``DataLoader`` that shuffles
            is read in the order of its dataset, unless its class has an ``__iter__`` of its own. 0-dimensional tensors
            and objects that are not tensors are constants. Mappings that are not registered as pytrees are passed on as
            dicts whose items are also attributes.
        call: ``(model, inputs) -> outputs``. It must use the model that it is passed, which is a copy. By default
            ``model(*inputs)`` for a tuple or list, ``model(**inputs)`` for a mapping, else ``model(inputs)``.
        output: which of the outputs ``[N, ...]`` count: an index into the axes after the first, as in ``output=3`` for
            ``[:, 3]`` or ``output=(-1, [0, 2])`` for ``[:, -1, [0, 2]]``, or a function of the model's outputs. A
            module passed here, or as ``call``, is part of the network.

    Returns:
        The module, and its x ``[N, ...]``: the tensor itself if ``inputs`` is a single one, else sample indices.

    Raises:
        BadInput: an argument cannot be used; says what is allowed.
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if call is not None and not callable(call):
        raise BadInput(f"call must be a function (model, inputs) -> outputs, got {one_line(repr(call))}")
    _check_output(output)
    inputs = _joined(model, inputs, call)
    if isinstance(inputs, Tensor) and call is None and output is None:
        return model, inputs
    model = unwrapped(model)
    if isinstance(inputs, Tensor):
        return Calling(model, call, output), inputs
    names, leaves, spec = _flattened(inputs, "inputs")
    rows = {name: leaf for name, leaf in zip(names, leaves, strict=True) if _has_rows(leaf)}
    _check_rows(rows)
    where = next((w.device for w in model.parameters()), torch.device("cpu"))
    leaves = [leaf.detach().to(where) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    given = ", ".join(f"{name} {tuple(leaf.shape)} of {leaf.dtype}" for name, leaf in rows.items())
    return Calling(model, call, output, leaves, Structure(spec), given), torch.arange(len(next(iter(rows.values()))))


def alike(module: nn.Module, model: nn.Module, copy: nn.Module | None = None) -> nn.Module:
    """Another model with the calling convention and the inputs of ``module``, which is from :func:`as_module`.

    Modules given as ``call`` or ``output`` are those of ``module`` itself, with their present values. Inputs are those
    of ``copy``, a copy of ``module``, if it is given: the caller may have written to its own.
    """
    if not isinstance(module, Calling) or not isinstance(model, nn.Module) or isinstance(model, Calling):
        return model
    leaves = copy.leaves if isinstance(copy, Calling) else module.leaves
    return Calling(unwrapped(model), module.call, module.output, leaves, module.structure, module.given)


def with_more(module: nn.Module, x1: Tensor, inputs: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """A module for two sets of inputs of the same kind.

    Args:
        module, x1: as :func:`as_module` returns them.
        inputs: the second set, with the structure of the first.

    Returns:
        A module on both sets, x1, and the x of the second set.

    Raises:
        BadInput: the second set does not match the first; says where.
    """
    inputs = _joined(module, inputs, module.call if isinstance(module, Calling) else None)
    if not isinstance(module, Calling):
        return module, x1, same_inputs(module, x1, inputs)
    if module.structure is None:
        return module, x1, same_samples(x1, inputs)
    names, leaves, spec = _flattened(_arranged(inputs, module.structure.spec), SECOND)
    if spec != module.structure.spec:
        raise BadInput(f"{SECOND} must have the structure of the first: {module.given}; got {', '.join(names)}")
    _check_rows({name: leaf for name, leaf in zip(names, leaves, strict=True) if _has_rows(leaf)})
    both = []
    for name, one, other in zip(names, module.leaves, leaves, strict=True):
        if difference := _difference(one, other):
            raise BadInput(f"{name} must be like that of the first: {difference}")
        both.append(torch.cat([one, other.detach().to(one)]) if _has_rows(one) else one)
    made = Calling(module.model, module.call, module.output, both, module.structure, module.given)
    own, total = (len(next(leaf for leaf in each if _has_rows(leaf))) for each in (module.leaves, both))
    return made, x1, torch.arange(own, total)


def restricted(problem: Problem, patterns: str | Sequence[str]) -> Problem:
    """The problem with theta restricted to the parameters that match some names; all others are frozen.

    Args:
        patterns: one or several names of parameters or modules, or patterns of such names with ``*`` and ``?``. A
            tensor that is tied under several names matches each of them.

    Raises:
        BadInput: a name matches no parameter, or none that is trainable.
    """
    chosen = _matching(problem, patterns)

    def parts(weights: Weights) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        theta = {key: w for key, w in weights.items() if key in chosen}
        return theta, {key: w for key, w in weights.items() if key not in chosen}

    theta_0, others_0 = parts(problem.theta_0)
    theta_f, others_f = (None, {}) if problem.theta_f is None else parts(problem.theta_f)
    return dataclasses.replace(
        problem,
        theta_0=theta_0,
        theta_f=theta_f,
        fixed_0={**problem.fixed_0, **others_0},
        fixed_f={**problem.fixed_f, **others_f},
        other=None if problem.other is None else restricted(problem.other, patterns),
    )


def groups(problem: Problem, patterns: Mapping[str, str | Sequence[str]]) -> dict[str, Problem]:
    """:func:`restricted` for each named group of parameters; if each parameter is in one group, their NTKs add up.

    Raises:
        BadInput: as :func:`restricted`; or the groups are not in a dict, or their names are not distinct.
    """
    if not isinstance(patterns, Mapping) or not patterns:
        raise BadInput(
            f"groups of parameters must be a dict from their names to patterns, got {one_line(repr(patterns))}"
        )
    if len({str(name) for name in patterns}) < len(patterns):
        raise BadInput(f"names of groups must differ as text, got {', '.join(map(repr, patterns))}")
    return {str(name): restricted(problem, chosen) for name, chosen in patterns.items()}


def _check_output(output: Any) -> None:
    parts = output if isinstance(output, tuple) else (output,)
    lists = [part for part in parts if isinstance(part, list)]
    fits = [_is_whole(p) or p is ... or isinstance(p, list) or (isinstance(p, slice) and _forward(p)) for p in parts]
    whole = all(_is_whole(i) for part in lists for i in part)
    if not (output is None or callable(output) or (parts and all(fits) and whole and len(lists) < 2)):
        raise BadInput(
            "output must be a whole number, a slice, ..., a list of whole numbers, a tuple of these with at most one "
            f"list, or a function of the outputs; got {output!r}"
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _forward(part: slice) -> bool:
    return part.step is None or (_is_whole(part.step) and part.step > 0)


def _joined(model: nn.Module, inputs: Any, call: Call | None) -> Any:
    """Inputs as a pytree, a loader's batches joined; without ``call``, a tuple or list of one tensor is unpacked."""
    if isinstance(inputs, DataLoader):
        if isinstance(model, nn.RNNBase) and not model.batch_first:
            raise BadInput(
                "batches of a DataLoader are joined along their first axis: the layer needs batch_first=True"
            )
        with reading(inputs) as batches:
            inputs = concatenated(batches)
    inputs = _plain(inputs)
    alone = call is None and isinstance(inputs, tuple | list) and len(inputs) == 1 and isinstance(inputs[0], Tensor)
    return inputs[0] if alone else inputs


@contextlib.contextmanager
def reading(loader: DataLoader[Any]) -> Iterator[Iterator[Any]]:
    """The batches of a loader in the order of its dataset; random generators are restored afterwards."""
    with generators_restored(), _own_generators_restored(loader):
        yield iter(_in_order(loader))


@contextlib.contextmanager
def unbatched(inputs: Any) -> Iterator[None]:
    """Add to a refusal that a loader does not batch its items, if it does not."""
    try:
        yield
    except BadInput as error:
        if not isinstance(inputs, DataLoader) or inputs.batch_sampler is not None:
            raise
        raise BadInput(
            f"{error}; the DataLoader has batch_size=None, so each of its items must be a batch [N, ...]: give it a "
            "batch_size if they are samples"
        ) from error


def _in_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader itself; for one that shuffles, a loader of the same samples in the order of the dataset."""
    sampler, own = loader.sampler, type(loader)
    every = type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    plain = own.__iter__ is DataLoader.__iter__ and own._get_iterator is DataLoader._get_iterator
    if not every or type(loader.batch_sampler) is not BatchSampler or not plain:
        return loader
    return DataLoader(
        loader.dataset,
        loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


@contextlib.contextmanager
def _own_generators_restored(loader: DataLoader[Any]) -> Iterator[None]:
    """Leave the generators of a loader and of its sampler as they were."""
    holders = (loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None), loader.batch_sampler)
    own = (getattr(holder, "generator", None) for holder in holders)
    found = [each for each in own if isinstance(each, torch.Generator)]
    states = [generator.get_state() for generator in found]
    try:
        yield
    finally:
        for generator, state in zip(found, states, strict=True):
            generator.set_state(state)


def _plain(inputs: Any) -> Any:
    """Inputs with mappings that are not registered as pytrees converted to dicts, at any depth."""
    return tree_map(lambda leaf: {k: _plain(v) for k, v in leaf.items()} if isinstance(leaf, Mapping) else leaf, inputs)


def grouped(batches: Iterable[Any], least: int) -> Iterator[Any]:
    """Batches joined into groups of at least ``least`` samples; the last group may have fewer."""
    kept: list[Any] = []
    rows = done = 0
    for batch in batches:
        kept.append(batch)
        rows += next((len(leaf) for leaf in tree_leaves(_plain(batch)) if _has_rows(leaf)), 0)
        if rows >= least:
            yield concatenated(kept, done)
            done += len(kept)
            kept, rows = [], 0
    if kept:
        yield concatenated(kept, done)


def concatenated(parts: Iterable[Any], start: int = 0) -> Any:
    """One pytree of all batches, on the host; they are numbered from ``start`` in messages."""
    kept: list[list[Any]] = []
    structure: TreeSpec | None = None
    for i, batch in enumerate(parts, start):
        batch = _plain(batch)
        names, leaves, spec = _flattened(_arranged(batch, structure) if structure else batch, f"batch {i}")
        structure = structure or spec
        if spec != structure:
            raise BadInput(f"batch {i} of the DataLoader differs from the first in its structure: {', '.join(names)}")
        _check_rows({name: leaf for name, leaf in zip(names, leaves, strict=True) if _has_rows(leaf)})
        kept.append([leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf for leaf in leaves])
        for name, one, other in zip(names, kept[0], kept[-1], strict=True):
            if difference := _difference(one, other):
                raise BadInput(
                    f"{name} of the DataLoader must be like the first one: {difference}; pad it, or collate it"
                )
    if structure is None:
        raise BadInput(NO_BATCH)
    columns = zip(*kept, strict=True)
    return tree_unflatten([torch.cat(column) if _has_rows(column[0]) else column[0] for column in columns], structure)


def _arranged(inputs: Any, spec: TreeSpec) -> Any:
    """Inputs with dict keys in the order of a structure; inputs of another structure are returned unchanged."""
    try:
        return tree_unflatten(spec.flatten_up_to(inputs), spec)
    except ValueError:
        return inputs


def _flattened(inputs: Any, name: str) -> tuple[list[str], list[Any], TreeSpec]:
    """Names, leaves and structure of inputs.

    Raises:
        BadInput: a leaf cannot be used; says which.
    """
    leaves, spec = tree_flatten(inputs)
    try:
        names = [name + keystr(path) for path, _ in tree_flatten_with_path(inputs)[0]]
    except ValueError:  # pytrees may be registered without names
        names = [f"leaf {i} of {name}" for i in range(len(leaves))]
    for where, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, np.ndarray):
            raise BadInput(f"{where} must be a torch tensor, got ndarray: use torch.from_numpy")
        if isinstance(leaf, Tensor) and (wrong := unusual(leaf)):
            raise BadInput(f"{where} must be an ordinary dense tensor, got a {wrong} one: pad or convert it first")
    return names, leaves, spec


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _check_rows(rows: Mapping[str, Tensor]) -> None:
    if not rows:
        raise BadInput("inputs must hold at least one tensor [N, ...], alone or in a tuple, list, dict or other pytree")
    if len({len(leaf) for leaf in rows.values()}) > 1:
        listed = ", ".join(f"{name} has {len(leaf)}" for name, leaf in rows.items())
        raise BadInput(
            f"tensors of the inputs must share their first axis, the samples; {listed}: pass what all share in call="
        )
    for name, leaf in rows.items():
        if not leaf.numel():
            raise BadInput(f"inputs must hold at least one sample [N, ...]; {name} has shape {tuple(leaf.shape)}")


def _difference(one: Any, other: Any) -> str:
    """How a leaf differs in kind from another; empty if it does not."""
    if _has_rows(one) and _has_rows(other):
        if one.shape[1:] == other.shape[1:] and _number(one) == _number(other):
            return ""
        shape = ", ".join(["N", *map(str, one.shape[1:])])
        return f"[{shape}] of {one.dtype}, got shape {tuple(other.shape)} of {other.dtype}"
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.ndim == other.ndim and torch.equal(one, other.to(one))
    else:
        same = type(one) is type(other) and (one is other or one == other)
    return "" if same else f"{_said(one)}, got {_said(other)}"


def _said(leaf: Any) -> str:
    return f"a tensor {tuple(leaf.shape)}" if _has_rows(leaf) else one_line(repr(leaf))


def _number(t: Tensor) -> object:
    """The kind of numbers that a tensor holds; for real and complex ones regardless of precision."""
    return "real" if t.is_floating_point() else "complex" if t.is_complex() else t.dtype


def _matching(problem: Problem, patterns: str | Sequence[str]) -> set[str]:
    """The parameters that match patterns, by their names in ``problem``."""
    each = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(each, Sequence) or not each or not all(isinstance(pattern, str) for pattern in each):
        raise BadInput(
            f"parameters must be a name or a pattern of names, or several of them, got {one_line(repr(patterns))}"
        )
    names = {key: key for key in (*problem.theta_0, *problem.fixed_0)}
    if problem.module is not None:
        keys = {id(w): key for key, w in problem.module.named_parameters()}
        names = {
            own_name(problem.module, alias): keys.get(id(w), alias)
            for alias, w in problem.module.named_parameters(remove_duplicate=False)
        }
    found: set[str] = set()
    for pattern in each:
        keys_of = {key for name, key in names.items() if _matches(name, pattern)}
        if not keys_of:
            raise BadInput(f"parameters={pattern!r} matches no parameter{_nearest(pattern, list(names))}")
        if keys_of.isdisjoint(problem.theta_0):
            remedy = "set requires_grad=True" if problem.module is not None else "allowed are arrays of real numbers"
            raise BadInput(f"parameters={pattern!r} matches only frozen parameters: {remedy}")
        found |= keys_of
    return found


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


LISTED = 8
"""Number of names that a message lists."""


def _nearest(pattern: str, names: list[str]) -> str:
    """The end of a refusal: the closest of the patterns that match something, and what the parameters are called."""
    modules = [name.rsplit(".", i)[0] for name in names for i in range(1, name.count(".") + 1)]
    able = dict.fromkeys([*names, *modules, *(f"*.{name.rsplit('.', 1)[1]}" for name in names if "." in name)])
    by_core = {each.removeprefix("*."): each for each in reversed(able)}
    close = [by_core[each] for each in difflib.get_close_matches(pattern.strip("*."), by_core, n=1)]
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{hint}; names are {', '.join([*names[:LISTED], *['...'] * (len(names) > LISTED)])}"
