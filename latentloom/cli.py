"""The command `latentloom`: a table of verbs. Each verb is imported only when it runs."""

import importlib
import os
import sys

from latentloom.environment import prepare_environment

VERBS = {
    "quickstart": "train both stages on the images of this package and generate samples, in a few minutes",
    "train": "train both stages on your images, then generate samples, in one command",
    "train-tokenizer": "train a tokenizer on images (stage one)",
    "tokenize": "encode images to codes with a tokenizer",
    "train-prior": "train a prior on codes (stage two)",
    "sweep": "search for better settings of a stage and write the best ones as a recipe",
    "sample": "generate images with a pipeline",
    "reconstruct": "encode and decode images with a tokenizer and show them side by side",
    "inspect-tokenizer": "write an HTML report on a tokenizer: errors, codes and how they are used",
    "inspect-prior": "write an HTML report on a prior: per-position likelihood and nearest training images",
    "evaluate": "measure a pipeline, a tokenizer or a set of samples against reference images",
    "report": "write an HTML report for a run: curves, samples, diagnostics and configuration",
    "push": "upload a pipeline to the Hugging Face Hub",
}


def format_usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items())
    return (
        f"usage: latentloom VERB [options]\n\nTwo-stage latent image generation on your own images.\n\n{verbs}\n\n"
        "`latentloom VERB --help` lists the options of a verb. --debug shows the traceback of an error, --version the version."
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one verb.

    Returns: The exit status: 0, 2 after an error that the user can correct, or 128 + n after signal n.
    """
    argv = sys.argv[1:] if arguments is None else arguments
    prepare_environment()
    debug, argv = "--debug" in argv, [word for word in argv if word != "--debug"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(format_usage())
        return 0
    if argv[0] == "--version":
        from latentloom import __version__

        print(f"latentloom {__version__}")
        return 0
    verb, *verb_argv = argv
    from training_harness.configuration import suggest_nearest
    from training_harness.errors import UserError
    from training_harness.signals import Interrupted

    try:
        if verb not in VERBS:
            raise UserError(f"unknown verb '{verb}'; {suggest_nearest(verb, list(VERBS))}")
        from training_harness.allocator import keep_freed_memory

        keep_freed_memory()
        importlib.import_module(f"latentloom.commands.{verb.replace('-', '_')}").main(verb_argv)
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except OSError as error:  # a full disk, or a folder without write permission
        if debug:
            raise
        path, reason = error.filename or "the system", error.strerror or type(error).__name__
        print(f"error: {path}: {reason}; expected to read or write it; --debug shows the traceback", file=sys.stderr)
        return 2
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return 128 + interruption.signal_number
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
