import pytest

from tests.conformance.subjects import EVERYTHING, SUBJECTS


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return SUBJECTS[request.param]()


@pytest.fixture(params=EVERYTHING)
def any_subject(request):
    """Also those whose dropout only they themselves can draw."""
    return EVERYTHING[request.param]()
