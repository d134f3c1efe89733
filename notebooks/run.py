"""Run the notebooks in order, each from top to bottom in a fresh kernel: `python notebooks/run.py [--only 01 04]`.

The model comes from the environment variable MODEL. On bookworm an executed notebook takes the place of the committed
one; on any other model it goes to figures/<model>/, on a reduced grid always to figures/reduced-grid/<model>/. MODELS
names several, which notebook 07 alone compares. What differs from run to run is dropped, so that a changed file means a
changed result. The first failing cell ends the run, and its notebook stays as it was.
"""

import argparse
import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbstripout import strip_output
from tqdm import tqdm

from helpers.claims import not_applicable
from helpers.config import CFG, FIGURES
from helpers.files import replacing

NOTEBOOKS = Path(__file__).resolve().parent
DEFAULT = "bookworm"
COMPARES = ["07"]  # the notebook that reads MODELS
RUN_METADATA = ["metadata.widgets", "cell.metadata.execution", "cell.metadata.ExecuteTime", "cell.metadata.collapsed"]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}
BAR = "    {n_fmt} of {total_fmt} cells |{bar:20}| {elapsed}, about {remaining} left"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
SKIP = ("NoSAEs", "TooLong")  # what helpers raise for a model without SAEs, or with a context too short for the texts
ADDRESS = re.compile(r" at 0x[0-9a-f]+(?=>)")  # <... object at 0x7f5b8f6f3450>


class Failure(RuntimeError):
    """A notebook that did not run to its end; the message says which, where and why."""


class NotForThisModel(Exception):
    """A notebook that needs something this model does not have, e.g. SAEs; the message says what."""


def chosen(folder: Path, only: list[str] | None = None) -> list[Path]:
    """The notebooks of `folder` in order, or those whose names begin with one of `only`.

    Raises Failure for a beginning that no notebook has, and when there are none at all.
    """
    found = sorted(folder.glob("[0-9]*.ipynb"))
    for start in only or []:
        if not any(path.name.startswith(start) for path in found):
            raise Failure(f"no notebook begins with {start!r}; there are: {', '.join(path.stem for path in found)}")
    if not found:
        raise Failure(f"there are no notebooks in {folder}")
    return [path for path in found if not only or path.name.startswith(tuple(only))]


def model_name(environ: dict[str, str]) -> str:
    """The model that MODEL names, bookworm by default; a local folder as an absolute path.

    Kernels run in the notebooks' folder, where a path that was typed elsewhere would lead nowhere.
    """
    name = environ.get("MODEL") or DEFAULT
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() and name != DEFAULT else name


def output_folder(model: str, notebooks: Path = NOTEBOOKS, figures: Path = FIGURES) -> Path:
    """Where the executed notebooks of `model` go, or that of MODELS.

    Raises what helpers.models raises for an unknown name.
    """
    if os.environ.get("MODELS"):
        from helpers.across import comparison

        return figures / comparison().name
    committed = not CFG.label
    if model == DEFAULT and committed:
        return notebooks
    from helpers.models import slug  # here, since it takes seconds to import

    folder = slug(model)
    return notebooks if folder == DEFAULT and committed else figures / folder


def normalised(notebook: NotebookNode) -> NotebookNode:
    """The executed notebook without what differs from run to run or from machine to machine.

    Gone are stderr (warnings, progress bars), widget views and states, timings, addresses in
    memory, and the version of Python.
    """
    notebook = strip_output(
        notebook,
        keep_output=True,
        keep_count=True,
        keep_id=True,
        extra_keys=RUN_METADATA,
        drop_output_types={"stream:stderr"},
    )
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _joined([output for output in cell.outputs if WIDGET_VIEW not in output.get("data", {})])
            for data in (output.data for output in cell.outputs if "data" in output):
                if "text/plain" in data:
                    data["text/plain"] = ADDRESS.sub("", data["text/plain"])
    notebook.metadata.kernelspec = NotebookNode(KERNEL)
    notebook.metadata.language_info = NotebookNode(LANGUAGE)
    return notebook


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs with printed pieces that follow each other in one: where the kernel flushes is a matter of time."""
    found: list[NotebookNode] = []
    for output in outputs:
        before = found[-1] if found else NotebookNode(output_type="none")
        if output.output_type == before.output_type == "stream" and output.name == before.name:
            before.text += output.text
        else:
            found.append(output)
    return found


def execute(source: Path, target: Path) -> None:
    """Run `source` in a fresh kernel, in its own folder, and write the result to `target`, whole or not at all.

    Raises Failure at the first cell that fails (NotForThisModel if it fails with one of SKIP), and OSError, before
    anything runs, when `target` cannot be written.
    """
    notebook = nbformat.read(source, as_version=4)
    with replacing(target) as temporary:
        asyncio.run(_executed(notebook, source))
        nbformat.write(normalised(notebook), temporary)


def run(sources: list[Path], folder: Path, card: Path) -> None:
    """Execute `sources` one after the other into `folder`, saying which one is running, how far, and how long.

    A notebook that does not apply to the model is skipped, with the reason, which its claims get as well in `card`, the
    model's own folder of figures; a committed notebook has to run.
    """
    started, ran = time.monotonic(), 0
    for number, source in enumerate(sources, start=1):
        print(f"[{number} of {len(sources)}] {source.stem}", flush=True)
        began = time.monotonic()
        try:
            execute(source, folder / source.name)
        except NotForThisModel as reason:
            if folder == source.parent:
                raise Failure(f"{source.name} does not run: {reason}") from None
            not_applicable(card, card.name, source.stem, str(reason).partition(". ")[0])
            print(f"    skipped: {reason}", flush=True)
            continue
        ran += 1
        print(f"    {_minutes(time.monotonic() - began)}, written to {_shown(folder / source.name)}", flush=True)
    print(f"{ran} of {len(sources)} notebooks ran, {_minutes(time.monotonic() - started)} in all", flush=True)


def main(arguments: list[str] | None = None, notebooks: Path = NOTEBOOKS, figures: Path = FIGURES) -> int:
    """Exit status: 0, or 1 with a message on stderr that says what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NN", help="beginnings of names, e.g. 01 04")
    only = parser.parse_args(arguments).only
    os.environ["MODEL"] = model = model_name(dict(os.environ))
    compared = os.environ["MODELS"] = " ".join(
        model_name({"MODEL": each}) for each in os.environ.get("MODELS", "").split()
    )
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch on huge pages: about a tenth faster
    try:
        sources = chosen(notebooks, COMPARES if compared and not only else only)
        folder = output_folder(model, notebooks, figures)
        print(f"Model: {compared or model}. Notebooks: {', '.join(source.stem for source in sources)}", flush=True)
        run(sources, folder, figures / DEFAULT if folder == notebooks else folder)
    except (Failure, OSError, ValueError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The notebook that was running stays as it was.", file=sys.stderr)
        return 130
    return 0


async def _executed(notebook: NotebookNode, source: Path) -> None:
    """Execute the cells in place. Raises Failure, or KeyboardInterrupt once the kernel is shut down."""
    at, stopped = 0, False
    this_task = asyncio.current_task()

    def listening(**_: object) -> None:  # nbclient's own handlers would make Ctrl-C look like a dead kernel
        if sys.platform == "win32":  # its loop has no signal handlers
            return
        with contextlib.suppress(RuntimeError):  # not the main thread
            for interruption in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(interruption, stop)

    def stop() -> None:
        nonlocal stopped
        stopped = True
        this_task.cancel()

    def entered(cell_index: int, **_: object) -> None:
        nonlocal at
        at = bar.n = cell_index
        bar.refresh()

    with tqdm(total=len(notebook.cells), bar_format=BAR, leave=False, file=sys.stdout) as bar:
        client = NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            resources={"metadata": {"path": str(source.parent)}},
            store_widget_state=False,
            extra_arguments=["--log-level=CRITICAL"],  # what matters comes back as a cell's error
            on_notebook_start=listening,
            on_cell_start=entered,
        )
        clock = asyncio.create_task(_ticking(bar))
        try:
            await client.async_execute()
        except CellExecutionError as error:
            bar.close()
            if error.ename in SKIP:
                raise NotForThisModel(error.evalue) from None
            raise Failure(_told(source, notebook, at, str(error).split("\n", 1)[1])) from None
        except (RuntimeError, asyncio.CancelledError) as error:
            if stopped:
                raise KeyboardInterrupt from None
            bar.close()
            why = f"{notebook.cells[at].source}\n\n{error}. Out of memory is the usual reason: try a smaller model."
            raise Failure(_told(source, notebook, at, why)) from None
        finally:
            clock.cancel()


async def _ticking(bar: tqdm) -> None:
    """Keep the elapsed time moving while a long cell runs: every second on a terminal, seldom in a log."""
    while True:
        await asyncio.sleep(1 if sys.stdout.isatty() else 20)
        bar.refresh()


def _told(source: Path, notebook: NotebookNode, at: int, why: str) -> str:
    without_colours = re.sub(r"\x1b\[[0-9;]*m", "", why)
    return f"{source.name} failed in cell {at + 1} of {len(notebook.cells)}:\n{without_colours.rstrip()}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.1f} s"


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())
