"""`/v1/videos` as OpenAI has it: create, retrieve, list, content, delete."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse

from launchers.serve.access import bearer
from launchers.serve.problems import Refusal
from launchers.serve.server import Server
from launchers.serve.videos import fields


def router(server: Server) -> APIRouter:
    def needs_key(request: Request) -> None:
        server.access.check_key(bearer(request.headers))

    routes = APIRouter(prefix="/v1/videos", dependencies=[Depends(needs_key)])
    videos = server.videos

    @routes.post("")
    async def create(request: Request) -> dict[str, Any]:
        fps = server.call.request.get("fps", 24)
        body = await fields.read(request, server.call.message_bytes, fps)
        return (await videos.create(body)).told()

    @routes.get("")
    async def every(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=100)] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        """A page of videos: those after one, in the order of their creation."""
        records = list(videos) if order == "asc" else list(videos)[::-1]
        if after is not None:
            records = records[records.index(videos.find(after)) + 1 :]
        page = [record.told() for record in records[:limit]]
        ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        return {"object": "list", "data": page, **ends, "has_more": len(records) > limit}

    @routes.get("/{video_id}")
    async def retrieve(video_id: str) -> dict[str, Any]:
        return videos.find(video_id).told()

    @routes.get("/{video_id}/content")
    async def content(video_id: str, variant: str = "video") -> FileResponse:
        """The MP4, or a range of its bytes."""
        record = videos.find(video_id)
        if variant != "video":
            raise Refusal("unsupported", f"variant {variant[:32]!r}: video is allowed", param="variant")
        if record.status == "failed":
            raise Refusal("not_found", "the video has failed; there is no content", param="video_id")
        if record.status != "completed":
            raise Refusal("not_finished", f"the video is {record.status}; ask again when it is completed")
        return FileResponse(record.file, media_type="video/mp4", filename=f"{record.id}.mp4")

    @routes.delete("/{video_id}")
    async def delete(video_id: str) -> dict[str, Any]:
        await videos.delete(videos.find(video_id))
        return {"id": video_id, "object": "video.deleted", "deleted": True}

    return routes
