"""The devices' port: hand their part of Flower's API on to the SuperLink, and refuse everything else.

A SuperLink answers devices, submitters and its own processes on one port, and asks only devices who they are. So it
listens on the loopback, where submitters come by ssh, and devices reach it through this::

    python gate.py --host 10.0.0.5 --port 8000 --superlink 127.0.0.1:8001 \\
      --root-certificates ca.crt --ssl-certfile server.pem --ssl-keyfile server.key
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import ssl
from collections.abc import Mapping

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fedfmd.flower_compat import DEVICE_CALLS, DEVICE_HEADERS, speaks_for_itself

MOST_BYTES = 16 * 2**20
"""Of a request; Flower sends arrays in pieces of 5 MiB."""

PATIENCE_S = 60
"""How long a request may take to arrive, and the SuperLink to answer it; a SuperNode waits 30 s."""

MOST_CONNECTIONS = 1024
"""At once; a SuperNode holds a few."""

log = logging.getLogger("fedfmd.gate")


def gate(superlink: httpx.AsyncClient) -> Starlette:
    """Return the application that hands on what devices ask of the SuperLink."""

    async def hand_on(request: Request) -> Response:
        call = request.path_params["call"]
        if call not in DEVICE_CALLS:
            raise HTTPException(404)
        body = await _body(request)
        if call == "push-messages" and not speaks_for_itself(body):
            raise HTTPException(403)
        try:
            reply = await superlink.post(
                f"/v1/fleet/{call}", content=body, headers=_of_flower(request.headers)
            )
        except httpx.TransportError:  # devices try again
            return Response("the SuperLink doesn't answer", 502)
        return Response(reply.content, reply.status_code, _of_flower(reply.headers))

    async def refuse(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        origin = request.client.host if request.client else "?"
        log.warning("%s: refused %s %r (%d)", origin, request.method, request.url.path, status)
        return Response("refused", status)

    route = Route("/v1/fleet/{call}", hand_on, methods=["POST"])
    return Starlette(routes=[route], exception_handlers={HTTPException: refuse})


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(PATIENCE_S):
            async for piece in request.stream():
                body += piece
                if len(body) > MOST_BYTES:
                    raise HTTPException(413)
    except TimeoutError:
        raise HTTPException(408) from None
    return bytes(body)


def _of_flower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith(DEVICE_HEADERS)}


def main() -> None:
    """Serve until a signal ends it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", required=True, help="address that devices reach")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--superlink", required=True, help="HOST:PORT of the SuperLink")
    parser.add_argument("--root-certificates", required=True, help="the CA's certificate")
    parser.add_argument("--ssl-certfile", required=True, help="the server's certificate")
    parser.add_argument("--ssl-keyfile", required=True, help="the server's key")
    options = parser.parse_args()
    superlink = httpx.AsyncClient(
        base_url=f"https://{options.superlink}",
        verify=ssl.create_default_context(cafile=options.root_certificates),
        timeout=PATIENCE_S,
        limits=httpx.Limits(max_connections=MOST_CONNECTIONS),
        trust_env=False,
    )
    logging.basicConfig(format="%(message)s")
    uvicorn.run(
        gate(superlink),
        host=options.host,
        port=options.port,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
        limit_concurrency=MOST_CONNECTIONS,
        access_log=False,
        log_level="warning",
        server_header=False,
    )


if __name__ == "__main__":
    main()
