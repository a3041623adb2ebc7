"""The reference of the library's functions: one page a subpackage, read from the exported modules without importing them.

An entry is what `help()` shows, the signature and the docstring, and leads to its chapter; every chapter leads back.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from bookparts.outline import PACKAGE, modules, page_link, read_chapter, source_link

VALUE = 90  # characters of a constant's value that are shown


@dataclass(frozen=True)
class Entry:
    """A public name of a module. kind: function, class, method, property or data; members: of a class."""

    kind: str
    name: str
    signature: str
    doc: str
    parameters: tuple[str, ...] = ()
    members: tuple["Entry", ...] = ()


def _signature(node: ast.FunctionDef, method: bool) -> tuple[str, tuple[str, ...]]:
    """The arguments as the source has them, without self, and their names."""
    arguments = ast.parse(ast.unparse(ast.FunctionDef(name="f", args=node.args, body=[ast.Pass()], decorator_list=[], lineno=0))).body[0].args
    for group in (arguments.posonlyargs, arguments.args):
        if method and group and group[0].arg in ("self", "cls"):
            group.pop(0)
            method = False
    ordered = (*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg)
    names = [one.arg for one in ordered if one]
    returned = f" -> {ast.unparse(node.returns)}" if node.returns is not None and node.name != "__init__" else ""
    return f"({ast.unparse(arguments)}){returned}", tuple(names)


def _decorators(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    found = (one.func if isinstance(one, ast.Call) else one for one in node.decorator_list)
    return {one.attr if isinstance(one, ast.Attribute) else one.id for one in found if isinstance(one, ast.Attribute | ast.Name)}


def _function(node: ast.FunctionDef, method: bool = False) -> Entry:
    marks = _decorators(node)
    kind = "property" if marks & {"property", "cached_property"} else "method" if method else "function"
    signature, names = _signature(node, method and "staticmethod" not in marks)
    return Entry(kind, node.name, "" if kind == "property" else signature, ast.get_docstring(node) or "", () if kind == "property" else names)


def _class(node: ast.ClassDef) -> Entry:
    functions = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    made = next((part for part in functions if part.name == "__init__"), None)
    typed = (part for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name))
    fields = [part for part in typed if not part.target.id.startswith("_")]
    if made:
        signature, names = _signature(made, True)
    elif fields and ("dataclass" in _decorators(node) or any(ast.unparse(base) == "NamedTuple" for base in node.bases)):
        signature = "(" + ", ".join(ast.unparse(part) for part in fields if part.simple) + ")"
        names = tuple(part.target.id for part in fields)
    else:
        signature, names = "", ()
    members = tuple(_function(part, True) for part in functions if not part.name.startswith("_"))
    return Entry("class", node.name, signature, ast.get_docstring(node) or "", names, members)


def _constant(node: ast.Assign | ast.AnnAssign) -> str:
    text = re.sub(r"\s+", " ", ast.unparse(node.value)) if node.value is not None else ""
    return text if len(text) <= VALUE else text[:VALUE] + " ..."


@cache
def read_module(module: str) -> tuple[str, tuple[Entry, ...]]:
    """The module's quote and its public names, in the order of its `__all__`; names of other modules in it are left out."""
    tree = ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    exported, found = [], {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = _function(node)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = _class(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(name, ast.Name) and name.id == "__all__":
                        exported = ast.literal_eval(node.value)
                    elif isinstance(name, ast.Name):
                        found[name.id] = Entry("data", name.id, _constant(node), "")
    return ast.get_docstring(tree) or "", tuple(found[name] for name in exported if name in found)


def _escaped(text: str, page: str) -> str:
    """A docstring as Markdown: what is not between backticks is taken literally, and a module between backticks leads to its chapter."""
    chapters, told = modules(), []
    for index, part in enumerate(re.split(r"(`[^`\n]+`)", text)):
        if index % 2:
            path = chapters.get(part.strip("`").removeprefix("defectbook."))
            told.append(f"[{part}]({source_link(path, page)})" if path else part)
        else:
            told.append(re.sub(r"([\\*_\[\]<>$#|~{}])", r"\\\1", part))
    return re.sub(r"(?m)^(\s*)([-+]|\d+\.)(?= )", r"\1\\\2", "".join(told))


def _directive(entry: Entry, module: str, page: str, chapter: str, owner: str = "") -> Iterator[str]:
    fence = "`" * (4 if entry.kind == "class" else 3)
    name = f"{owner}.{entry.name}" if owner else entry.name
    yield f"{fence}{{py:{entry.kind}}} {name}{entry.signature if entry.kind != 'data' else ''}"
    yield f":module: defectbook.{module}"
    if entry.kind == "data" and entry.signature:
        yield f":value: {entry.signature}"
    yield ""
    lead = "" if owner else f" [→ {chapter}]({source_link(modules()[module], page)})"
    yield _escaped(entry.doc, page) + lead
    yield ""
    for member in entry.members:
        yield from _directive(member, module, page, chapter, entry.name)
    yield fence
    yield ""


def subpackage(page: str) -> str:
    """"data" of nbs/reference/api/data.md."""
    return page.rsplit("/", 1)[-1].removesuffix(".md")


def modules_of(package: str) -> list[str]:
    return [module for module in modules() if module.split(".")[0] == package]


def api_page(page: str, _: str = "") -> str:
    """All public names of the subpackage that `page` is named after."""
    lines = []
    for module in modules_of(subpackage(page)):
        quote, entries = read_module(module)
        path = modules()[module]
        chapter = read_chapter(path)
        lines += [f"## {module}", "", f"> {_escaped(quote, page)}" if quote else "", "",
                  f"```{{py:module}} defectbook.{module}\n```", "",
                  f"Chapter: [{chapter.title}]({source_link(path, page)}). In Python: `from defectbook.{module} import ...`", ""]
        for entry in entries:
            lines += _directive(entry, module, page, chapter.number or "0")
    return "\n".join(lines)


def modules_list(page: str, _: str = "") -> str:
    """The modules of all subpackages with what they say of themselves, each leading to its place in the reference."""
    lines = []
    for package in dict.fromkeys(module.split(".")[0] for module in modules()):
        lines += [f"## {package}", ""]
        for module in modules_of(package):
            quote, entries = read_module(module)
            names = ", ".join(f"`{entry.name}`" for entry in entries if entry.kind != "data")
            lines.append(f'- <a href="{api_link(module, page)}"><code>{module}</code></a>: {_escaped(quote, page)} {names}')
        lines.append("")
    return "\n".join(lines)


def _page_of(module: str) -> str:
    return f"nbs/reference/api/{module.split('.')[0]}.md"


def api_link(module: str, page: str, name: str = "") -> str:
    """The address of a module's entries, or of one of its names, from the built page of `page`."""
    return page_link(_page_of(module), page) + (f"#defectbook.{module}.{name}" if name else f"#module-defectbook.{module}")


def api_line(path: str) -> str:
    """The line at a chapter's end that leads to its functions; "" for a chapter that exports nothing."""
    module = read_chapter(path).module
    if not module:
        return ""
    links = ", ".join(f'<a href="{api_link(module, path, entry.name)}"><code>{entry.name}</code></a>'
                      for entry in read_module(module)[1] if entry.kind != "data")
    return f'**In the reference:** <a href="{api_link(module, path)}"><code>defectbook.{module}</code></a>' + (f" ({links})." if links else ".")
