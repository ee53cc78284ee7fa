"""Probes: is the process alive, may it be sent traffic."""

from fastapi import APIRouter, Request, Response
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
async def readyz(request: Request, response: Response) -> Health:
    """All models are loaded and the service is not shutting down; else 503."""
    if request.app.state.inference is None:
        response.status_code = 503
        return Health(status="stopping")
    return Health(status="ready")
