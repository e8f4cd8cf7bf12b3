"""The page about traffic: requests and latency of the last hour, by the process' own metrics."""

from __future__ import annotations

import time

from fastapi import APIRouter
from markupsafe import Markup
from starlette.responses import HTMLResponse

from lazydp.components.shared.plot import Axis, Series, chart, number_axis, time_axis
from lazydp.service.console.rendering import page
from lazydp.service.http.traffic import MINUTES, Hour
from lazydp.service.routes.deps import InContext

router = APIRouter(tags=["pages"])

_MINUTE_S = 60.0
QUANTILES = (("first", "half of them"), ("second", "95 %"), ("third", "99 %"))


@router.get("/traffic", response_class=HTMLResponse, summary="The page about traffic")
async def traffic_page(context: InContext) -> HTMLResponse:
    """Requests and latency of the last hour, by minute and by route, of this process alone."""
    hour = context.traffic.hour(time.time())
    return page(
        context,
        "traffic.html",
        hour=hour,
        quantiles=QUANTILES,
        requests=Markup(_requests(hour)),  # noqa: S704 - escaped where it is drawn
        latency=Markup(_latency(hour)),  # noqa: S704 - likewise
    )


def _hour_axis(hour: Hour) -> Axis:
    return time_axis("time (UTC)", first=hour.until - MINUTES * _MINUTE_S, last=hour.until, count=6)


def _requests(hour: Hour) -> str:
    most = max(load.requests for _, load in hour.minutes)
    return chart(
        f"Requests in each minute of the last hour: {hour.total.requests} together, {most} at most in one minute, "
        f"{hour.total.failed} that failed",
        across=_hour_axis(hour),
        up=number_axis("requests per minute", high=max(most, 1)),
        series=[
            Series("first", [(at, load.requests) for at, load in hour.minutes], "bars", width=_MINUTE_S),
            Series("second", [(at, load.failed) for at, load in hour.minutes], "bars", width=_MINUTE_S),
        ],
    )


def _latency(hour: Hour) -> str:
    shown = [(at + _MINUTE_S / 2, load.quantiles) for at, load in hour.minutes]
    slowest = max((1000 * found[2] for _, found in shown if found is not None), default=1.0)
    whole = hour.total.quantiles
    words = "no requests"
    if whole is not None:
        words = f"half within {1000 * whole[0]:.3g} ms, 99 % within {1000 * whole[2]:.3g} ms"
    return chart(
        f"Latency in each minute of the last hour: {words}",
        across=_hour_axis(hour),
        up=number_axis("milliseconds", high=slowest),
        series=[
            Series(kind, [(at, None if found is None else 1000 * found[place]) for at, found in shown])
            for place, (kind, _) in reversed(list(enumerate(QUANTILES)))
        ],
    )
