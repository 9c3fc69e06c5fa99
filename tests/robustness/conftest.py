"""Options for more than CI runs, and the helpers of other folders that these tests share."""

import os
import sys
from pathlib import Path

import pytest

# The artifacts and calibrations that other folders start from are small; these tests damage the same ones.
for _folder in ("artifacts", "stages"):
    sys.path.append(str(Path(__file__).parents[1] / _folder))
# Children are forked while a tokenizer may already have been used; its threads do not survive that.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from victims import CI_EXAMPLES, CI_KILLS  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=CI_KILLS, help="random kills of each stage")
    parser.addoption("--fuzz-examples", type=int, default=CI_EXAMPLES, help="examples of each fuzz target")


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """Random kills of each stage. The option is unknown where this folder was not named to pytest."""
    return int(request.config.getoption("--kills", CI_KILLS))


@pytest.fixture
def fuzz_examples(request: pytest.FixtureRequest) -> int:
    """Examples of each fuzz target."""
    return int(request.config.getoption("--fuzz-examples", CI_EXAMPLES))
