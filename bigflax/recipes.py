"""Recipes: a run as one ConfigDict, resolved against the signatures of the functions that it feeds.

A recipe is a Python file with `get_config()`. A section holds keyword arguments of one function (`known_keys`), so a default lives in one
place, that function's signature. `resolve` writes the defaults in; an unknown key is an error that names the nearest known ones.
`--config.model.hidden_size=256` overrides, with its type checked. The resolved config is printed, saved with each checkpoint, and compared
when a run resumes.

Left out on purpose: inheritance between recipes. A recipe is Python: import another one and change it.
"""

import ast
import contextlib
import importlib.util
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from bigflax import chains, checkpoint, data, hub, models, optim, peft, sharding, tasks, train, trees
from bigflax.compress import distill
from bigflax.data.loader import Loader
from bigflax.data.quality import Quality
from bigflax.generate import check

Config = Any  # a ConfigDict, whose attributes no type checker knows

# What may differ between a run and its continuation without changing what is learned.
HARMLESS = (
    "work",
    "fit.log_every",
    "fit.profile",
    "fit.save_every",
    "fit.save_minutes",
    "step.flags",
    "checkpoint",
    "compress",
    "sample",
    "yardsticks",
    "data.workers",
    "data.prefetch",
)


def _keywords(function: Callable[..., Any], *given: str) -> dict[str, Any]:
    """The parameters of a function that a recipe may set, and their defaults; `given` are those that the program fills in itself."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in given}


def data_kind(model: str, task: str) -> data.Kind:
    """The kind of data that a model of this family takes for this task. Raises ValueError where there is none for it."""
    takes, kinds = models.family(model).build().example(), {**data.KINDS, **tasks.find(task).kinds}
    found = next((kinds[name] for name in takes if name in kinds), None)
    if found is None:
        raise ValueError(f"{model} takes {', '.join(takes)}, which no data of a recipe gives; there is data of {', '.join(kinds)}")
    return found


def model_keys(said: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The fields of a recipe's model and their defaults: those of its family, those of its size, or those of the published weights, `source`, that it
    begins with. The head is the task's, where it has one."""
    name, size, source, wanted = said.get("name"), said.get("size"), said.get("source"), tasks.find(task).head
    if source is not None and size is not None:
        raise ValueError(f"model.source {source!r} has a size of its own; leave out model.size {size!r}")
    published = name or "" if source is None else hub.describe(source, None)[0]
    if name not in (None, published):
        raise ValueError(f"model.source {source!r} holds a {published}, not the {name} that model.name says")
    family = models.family(published)
    if size is not None and size not in family.SIZES:
        raise ValueError(f"{published} has no size {size!r}; {trees.did_you_mean(size, family.SIZES, 'the sizes are')}")
    head = {"head": wanted} if wanted is not None and wanted in getattr(family, "HEADS", {}) else {}
    config = (family.SIZES[size] if size else {}) if source is None else hub.describe(source, said.get("head", head.get("head", "")))[1]
    parts = {part: models.part_fields(build) | config.get(part, {}) for part, build in getattr(family, "PARTS", {}).items()}
    return {"name": published, "size": None, "source": None, **_keywords(family.build), **config, **parts, **head}


def peft_keys(name: str | None) -> dict[str, Any]:
    """What a recipe may say of this method of fine-tuning few weights; without one all of them train."""
    if name is None:
        return {"name": None}
    dropout = {"dropout": 0.0} if name in ("lora", "dora") else {}
    return {"name": name, "also": None, **dropout, **_keywords(peft.method(name), "params", "model", "axes", "rng")}


def teacher_keys(said: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a recipe may say of a teacher, where it has one (taught.py)."""
    if said is None:
        return {}
    return {"teacher": {"source": inspect.Parameter.empty, "every": None, **_keywords(distill.lesson, "task", "student", "teacher")}}


def home_of(source: str) -> str:
    """Where the tokenizer of a run's work folder, or of a folder of weights, is."""
    return os.path.join(source, "tokenizer") if os.path.isdir(os.path.join(source, "checkpoints")) else source


def known_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe may say, as a nested dict of defaults; what model, data and task take depends on the names of model and task."""
    task, source = config["task"]["name"], config["model"].get("source")
    model = model_keys(config["model"], task)
    kind = data_kind(model["name"], task)
    parts = {name: model[name] for name in getattr(models.family(model["name"]), "PARTS", {})}
    # None: what the data say, unless published weights have it already
    follows = lambda fields: {name: None for name in kind.follows if name in fields and (source is None or name == "num_labels")}
    reader = {} if kind.reader is None else _keywords(kind.reader, "tokenizer", "classes", "num_labels", "reference")
    if kind.reader is not None and "classes" in inspect.signature(kind.reader).parameters:
        reader["classes"] = None
    epochs = (config.get("fit") or {}).get("epochs")
    words, prompt = {}, {}
    if kind.tokenized:
        taught = (config.get("teacher") or {}).get("source")
        path = source if source is not None or taught is None else home_of(taught)
        home = {"kind": "bpe", "path": None} if path is None else {"kind": "file", "path": path}
        words = {"tokenizer": {**home, **_keywords(data.train_bpe, "texts"), "vocab_size": 8192}}
    if tasks.find(task).asks is not None:
        prompt["generate"] = {
            "scores": (), "records": 100, **_keywords(check, "model", "length"), "max_new_tokens": 64, "temperature": 0.0,
        }  # fmt: skip
    if kind.prompt is not None:
        prompt["sample"] = {"prompt": "", **_keywords(check, "model", "length"), "max_new_tokens": 100}
    if kind.prose:
        prompt["yardsticks"] = False
    return {
        "seed": 0,
        "work": "",
        "model": {**model, **{name: {**part, **follows(part)} for name, part in parts.items()}, **follows(model)},
        **words,
        "data": {
            **reader,
            **_keywords(kind.batches, *kind.given, "split", "seed", "repeat", "mesh", "quality", "loader"),
            "validation_source": None,
            **_keywords(Loader, "make_shard", "mesh", "finite", "quality", "identity", "batch_size"),
            **_keywords(Quality, "quarantine", "bad", *(() if kind.prose else ("max_line", "field"))),
        },
        "task": {
            "name": "",
            **_keywords(tasks.find(task).loss, "model", "token_bytes", "classes", "reference"),
            **_keywords(tasks.create, "name", "model"),
        },
        "peft": peft_keys((config.get("peft") or {}).get("name")),
        **teacher_keys(config.get("teacher")),
        "optimizer": _keywords(optim.make, "axes", "steps"),
        "mesh": dict.fromkeys(sharding.MESH_AXES, 1) | {"data": -1},
        # the rows of the layout, but for the batch's, which loaders share
        "table": {name: (row,) if isinstance(row, str) else tuple(row) for name, row in sharding.TABLE.items() if name != "batch"},
        "step": _keywords(train.train_step, "loss_fn", "tx", "state", "seed", "table"),
        "fit": {
            "epochs": None,
            **_keywords(train.fit, "state", "step", "loader", "evaluate", "checkpoints", "meta", "write", "meter", "watch", "stop"),
            **({} if epochs is None else {"steps": None}),
        },
        "watch": {**_keywords(train.Watch), "metric": "loss"},
        "checkpoint": _keywords(checkpoint.Checkpoints, "folder", "best"),
        "compress": {**_keywords(chains.compress, "run", "weights", "labels", "say"), "chain": ()},
        **prompt,
    }


def find(name: str) -> str:
    """The file of a recipe: a path, or a name in ./configs or among those that came with the package. Raises FileNotFoundError that lists them."""
    if name.endswith(".py"):
        if os.path.exists(name):
            return name
        raise FileNotFoundError(f"there is no recipe file {name!r}")
    home = os.path.dirname(os.path.abspath(__file__))
    folders = [
        folder
        for folder in ("configs", os.path.join(home, "configs"), os.path.join(os.path.dirname(home), "configs"))
        if os.path.isdir(folder)
    ]
    for folder in folders:
        if os.path.exists(path := os.path.join(folder, name + ".py")):
            return path
    known = {file[:-3] for folder in folders for file in os.listdir(folder) if file.endswith(".py") and file != "__init__.py"}
    raise FileNotFoundError(f"there is no recipe {name!r}; {trees.did_you_mean(name, known, 'there are')}")


def _module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"recipe_{os.path.basename(path)[:-3]}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(name: str) -> Config:
    """The recipe `name`, a name or a path, as its file states it; "name:variant" passes the variant to its `get_config`."""
    name, _, variant = name.partition(":")
    path = find(name)
    module = _module(path)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no get_config(), which returns the recipe")
    return module.get_config(variant) if variant else module.get_config()


def chain_table() -> dict[str, list[dict[str, Any]]]:
    """The chains of configs/compress.py by their names."""
    return _module(find("compress")).CHAINS


def load_chain(name: str) -> list[dict[str, Any]]:
    """A chain of configs/compress.py by its name. Raises ValueError that lists them."""
    if name not in (there := chain_table()):
        raise ValueError(f"there is no chain {name!r}; {trees.did_you_mean(name, there, 'there are')}")
    return there[name]


def resolve(recipe: Config, overrides: Iterable[str] = ()) -> Config:
    """The recipe with every default written in and `key=value` overrides applied. Raises ValueError for what no function takes."""
    said = _plain(recipe)
    changes = [parse_override(text) for text in overrides]
    for path, value in changes:  # these decide which keys there are
        if path in ("model.name", "model.size", "model.source", "task.name", "peft.name", "teacher.source", "fit.epochs"):
            section, key = path.split(".")
            said.setdefault(section, {})[key] = value
    for section in ("model", "task", "data"):
        if section not in said:
            raise ValueError(f"a recipe needs a section {section!r}")
    full = known_keys(said)
    _check(said, full)
    config = ConfigDict(_merge(full, said), type_safe=True, convert_dict=True)
    for path, value in changes:
        set_key(config, path, value)
    _require(config)
    return config.lock()


def _plain(config: Any) -> Any:
    return {k: _plain(v) for k, v in config.items()} if isinstance(config, ConfigDict | dict) else config


def _check(said: Mapping[str, Any], full: Mapping[str, Any], where: str = "") -> None:
    for key, value in said.items():
        if key not in full:
            raise ValueError(f"unknown key {where + key!r} in the recipe; {trees.did_you_mean(key, full)}")
        if isinstance(value, Mapping) and isinstance(full[key], Mapping):
            _check(value, full[key], f"{where}{key}.")


def _merge(full: Any, said: Any) -> Any:
    return {
        k: _merge(v, said[k]) if k in said and isinstance(v, dict) and isinstance(said[k], dict) else said.get(k, v)
        for k, v in full.items()
    }


def parse_override(text: str) -> tuple[str, Any]:
    """ "optimizer.lr=1e-3" -> ("optimizer.lr", 0.001); what is no Python literal stays a string."""
    path, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"override {text!r} has no value; write --config.{path}=VALUE")
    try:
        return path, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return path, {"true": True, "false": False}.get(value.lower(), value)  # not "none", which names a remat policy: None


def set_key(config: Config, path: str, value: Any) -> None:
    """Sets one key of a resolved config. Raises ValueError for an unknown key or a value of another type."""
    *sections, key = path.split(".")
    for section in sections:
        if section not in config or not isinstance(config[section], ConfigDict):
            raise ValueError(f"unknown key {path!r}; {trees.did_you_mean(section, config)}")
        config = config[section]
    if key not in config:
        raise ValueError(f"unknown key {path!r}; {trees.did_you_mean(key, config)}")
    try:
        with config.ignore_type() if config[key] is inspect.Parameter.empty else contextlib.nullcontext():  # not said yet: of any type
            config[key] = value
    except TypeError:
        raise ValueError(f"{path} is {config[key]!r}, a {type(config[key]).__name__}; {value!r} is a {type(value).__name__}") from None


def _require(config: Config, where: str = "") -> None:
    for key, value in config.items():
        if value is inspect.Parameter.empty:
            raise ValueError(f"the recipe must set {where + key!r}: it has no default")
        if isinstance(value, ConfigDict):
            _require(value, f"{where}{key}.")


def flat(config: Any, where: str = "") -> dict[str, Any]:
    """{"model.hidden_size": 256, ...}, with values as JSON keeps them."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict | dict)
        out |= flat(value, f"{where}{key}.") if nested else {where + key: json.loads(json.dumps(value, default=lambda _: "(to be set)"))}
    return out


def unflatten(keys: Mapping[str, Any]) -> Config:
    """The inverse of `flat`."""
    config: dict[str, Any] = {}
    for path, value in keys.items():
        *sections, key = path.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return ConfigDict(config)


def diff(old: Any, new: Any, *, ignore: Iterable[str] = ()) -> list[str]:
    """One line for each key that differs: "optimizer.lr: 0.001 -> 0.002"."""
    a, b = flat(old), flat(new)
    ignored = tuple(ignore)
    skip = lambda key: any(key == i or key.startswith(i + ".") for i in ignored)
    absent = "(not there)"
    return [
        f"{key}: {a.get(key, absent)!r} -> {b.get(key, absent)!r}"
        for key in sorted({*a, *b})
        if a.get(key, absent) != b.get(key, absent) and not skip(key)
    ]


COUNTS = {"vocab_size": "the tokenizer's {}", "num_labels": "the data's {} classes"}  # of which a model may have more
SAME = {"image_size": "data.size, {}", "num_channels": "the {} channels of data.mean"}


def agreed(section: Any, asked: Mapping[str, Any], where: str = "model") -> dict[str, Any]:
    """Of these fields those that the model has, in its parts too, which come whole: as the recipe says, or where it says None as the data ask. Raises
    ValueError where the two disagree, and where neither says anything."""
    found: dict[str, Any] = {}
    for name, said in section.items():
        if isinstance(said, ConfigDict):
            found |= {name: {**said, **part}} if (part := agreed(said, asked, f"{where}.{name}")) else {}
        elif name in asked:
            value, key = asked[name], f"{where}.{name}"
            if said is None and value is None:
                raise ValueError(f"the recipe must set {key!r}: the data do not say it")
            if said is not None and value is not None:
                if name in COUNTS and said < value:
                    raise ValueError(f"{key} {said} is smaller than {COUNTS[name].format(value)}")
                if name in SAME and said not in (value, (value, value)):
                    raise ValueError(f"{key} {said} is not {SAME[name].format(value)}; leave it out, and it follows")
            found[name] = value if said is None else said
    return found


def model_fields(config: Config, kind: data.Kind, words: Mapping[str, int], classes: Any) -> dict[str, Any]:
    """What the model takes from its data: `words` are the fields that its tokenizer says; `classes`, their names or number, may not be known."""
    pixels = {"image_size": config.data.size, "num_channels": len(config.data.mean)} if "image_size" in kind.follows else {}
    labels = (
        {"num_labels": classes if classes is None or isinstance(classes, int) else len(classes)} if "num_labels" in kind.follows else {}
    )
    return agreed(config.model, {name: value for name, value in {**words, **pixels, **labels}.items() if name in kind.follows})
