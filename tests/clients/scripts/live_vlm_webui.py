"""live-vlm-webui without a browser: it plays a video file, and its WebSocket says what each frame shows."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
import av
from PIL import Image

TASK = json.loads(os.environ["VTP_TASK"])
MODEL = TASK["models"][0]
COUNT = 8  # answers that are waited for
PATIENCE = 120.0


def write_clip(path: Path) -> None:
    """The picture as a video that does not move, as good as H.264 makes it."""
    picture = Image.open(TASK["picture"]).convert("RGB")
    with av.open(str(path), "w") as clip:
        stream = clip.add_stream("libx264", rate=10, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = *picture.size, "yuv444p"
        for _ in range(20):
            clip.mux(stream.encode(av.VideoFrame.from_image(picture)))
        clip.mux(stream.encode(None))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


async def watch(url: str, clip: Path) -> tuple[list[str], list[str]]:
    """The models that it lists, and its first answers to the prompt."""
    async with aiohttp.ClientSession(url) as session:
        await reachable(session)
        async with session.get("/models", params={"api_base": TASK["url"] + "/v1"}) as answer:
            listed = await answer.json()
        models = [one["id"] for one in listed["models"]]
        async with session.ws_connect("/ws?session_id=s1") as socket_:
            await socket_.send_json({"type": "update_prompt", "prompt": TASK["prompt"], "max_tokens": 16})
            async for message in socket_:
                if message.json()["type"] == "prompt_updated":
                    break
            async with session.post(
                "/api/rtsp/start", json={"rtsp_url": str(clip), "session_id": "s1"}
            ) as answer:
                assert answer.status == 200, await answer.text()
            said: list[str] = []
            async for message in socket_:
                found = message.json()
                if found["type"] == "vlm_response" and found["metrics"]["total_inferences"] > len(said):
                    said.append(found["text"])
                if len(said) == COUNT:
                    break
            await session.post("/api/rtsp/stop", json={"session_id": "s1"})
        return models, said


async def reachable(session: aiohttp.ClientSession) -> None:
    for _ in range(600):
        try:
            async with session.get("/"):
                return
        except aiohttp.ClientConnectionError:
            await asyncio.sleep(0.1)
    raise SystemExit("live-vlm-webui does not answer")


with tempfile.TemporaryDirectory() as folder:
    clip, port = Path(folder, "clip.mp4"), free_port()
    write_clip(clip)
    command = [str(Path(sys.executable).with_name("live-vlm-webui")), "--no-ssl", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--api-base", TASK["url"] + "/v1", "--model", MODEL]
    command += ["--process-every", "5", "--prompt", TASK["prompt"]]
    log = Path(folder, "log")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder)
    try:
        job: Any = watch(f"http://127.0.0.1:{port}", clip)
        models, said = asyncio.run(asyncio.wait_for(job, PATIENCE))
    except BaseException:
        print(log.read_text()[-3000:], file=sys.stderr)
        raise
    finally:
        process.terminate()
        process.wait(20)
answers = {f"stripped: frame {place}": text for place, text in enumerate(said)}
print(json.dumps({"answers": {MODEL: answers}, "models": models}))
