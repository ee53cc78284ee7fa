"""Half an hour at half of what one worker can do, on every route, while versions are published.

Every request is answered 200, and what the process holds does not grow: its resident memory is
fitted by a line over the time after a third of the run.
"""

import pytest

from tests.reliability.figures import SCALE

MINUTES = 30 * SCALE
pytestmark = pytest.mark.timeout(60 * MINUTES + 300)

CALIBRATION = 20  # seconds
CONNECTIONS = 64
PUBLISH_EVERY, KEEP = 60 * min(1, MINUTES / 5), 4  # seconds, versions
SAMPLE_EVERY = 1.0  # seconds
WARM_UP = 1 / 3  # of the run
MOST_GROWTH = 10.0  # MB an hour

MIB = 2**20
