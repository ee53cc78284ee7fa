"""Probes: is the process alive, may it be sent traffic."""

from fastapi import APIRouter
from fastapi.responses import RedirectResponse

from service.schemas import Health

router = APIRouter(tags=["operations"])


@router.get("/", include_in_schema=False)
async def home() -> RedirectResponse:
    """Lead to the documentation."""
    return RedirectResponse("/docs")


@router.get("/livez")
async def livez() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/readyz")
@router.get("/healthz", name="healthz")
async def readyz() -> Health:
    """All models are loaded: nothing listens before they are, nor from the moment of shutdown."""
    return Health(status="ready")
