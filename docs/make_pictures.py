"""The README's pictures, from the embedded model's real events and the real page.

python docs/make_pictures.py            # writes docs/pictures/denoising.png: one answer being denoised, step by step
python docs/make_pictures.py --page     # docs/pictures/page.png: app.py in a browser; layers are reused
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast_dllm.decode.arguments import ModelArguments
from fast_dllm.ui.chat import AnswerFrame, Chatbot, Conversation

ROOT = Path(__file__).resolve().parent.parent
QUESTION = (
    "Hugo has 80 cookies. He drops 30. He makes 22 more. Then he puts them evenly into 9 boxes. "
    "How many cookies are in each?"
)
PADDING, CELL_GAP, ROW_HEIGHT, WIDTH = 16, 3, 30, 1180
INK, MASK, SEEN, LINE = "#111827", "#cbd5e1", "#f1f5f9", "#4f46e5"


def load_font(size: int) -> ImageFont.FreeTypeFont:
    for name in ("DejaVuSansMono.ttf", "LiberationMono-Regular.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def draw_frame(draw: ImageDraw.ImageDraw, frame: AnswerFrame, top: int, font: ImageFont.FreeTypeFont) -> int:
    """Draw one frame's cells from `top` down, a new line at every block; returns where the next thing may start."""
    label = f"step {frame.steps}, {frame.kind}: {frame.num_tokens} tokens"
    draw.text((PADDING, top), label, fill="#475569", font=font)
    top += ROW_HEIGHT - 6
    x = PADDING
    for cell in frame.cells:
        shown = "  " if cell.text is None else cell.text.replace("\n", "↵").replace(" ", "·") or "∅"
        width = draw.textlength(shown, font=font) + 8
        starts_block = cell.position % frame.block_size == 0
        if x + width > WIDTH - PADDING:
            x, top = PADDING, top + ROW_HEIGHT
        colour = MASK if cell.text is None else SEEN
        if frame.is_new(cell):
            colour = f"hsl({int(120 * cell.confidence)}, 70%, 72%)"
        if starts_block and x > PADDING:
            draw.line([(x, top), (x, top + ROW_HEIGHT - 6)], fill=LINE, width=3)
            x += 6
        draw.rounded_rectangle([x, top, x + width, top + ROW_HEIGHT - 6], 4, fill=colour)
        draw.text((x + 4, top + 3), shown, fill=INK, font=font)
        x += width + CELL_GAP
    return top + ROW_HEIGHT + 8


def strip(frames: list[AnswerFrame], question: str, footer: str) -> Image.Image:
    font = load_font(15)
    image = Image.new("RGB", (WIDTH, 2000), "white")
    draw = ImageDraw.Draw(image)
    draw.text((PADDING, PADDING), question, fill=INK, font=font)
    top = PADDING + ROW_HEIGHT
    for frame in frames:
        top = draw_frame(draw, frame, top, font)
    draw.text((PADDING, top), footer, fill="#475569", font=font)
    return image.crop((0, 0, WIDTH, top + ROW_HEIGHT))


def photograph_page(model: str, path: Path) -> None:
    """Photograph the page in a real browser: an example with k = 3, replayed to a forward in which layers rest."""
    from playwright.sync_api import sync_playwright

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--model", model]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--headless", "--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page(viewport={"width": 1280, "height": 960})
            for _ in range(240):
                try:
                    page.goto(f"http://127.0.0.1:{port}/")
                    break
                except Exception:
                    if server.poll() is not None:
                        raise
                    time.sleep(0.5)
            page.wait_for_timeout(2000)  # a click before the page is alive is forgotten
            page.locator("#examples button", has_text="k = 3").last.click()
            page.wait_for_function("document.querySelector('#message textarea').value")
            page.click("#send")
            page.wait_for_selector("#cells .done", timeout=120_000)
            resting = page.locator("#layers g[data-step]:has(.reused)")
            resting.nth(resting.count() // 2).click()
            page.wait_for_selector("#cells .m")
            page.wait_for_timeout(1000)
            page.evaluate("window.scrollTo(0, 0)")
            page.screenshot(path=str(path))
            browser.close()
    finally:
        server.terminate()
        server.wait()
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures" / "denoising.png")
    parser.add_argument("--page", action="store_true", help="photograph the page instead; needs chromium")
    arguments = parser.parse_args()
    if arguments.page:
        photograph_page(arguments.model, ROOT / "docs" / "pictures" / "page.png")
        return
    chatbot = Chatbot(ModelArguments.parse(model_path=arguments.model, max_new_tokens=96))
    conversation = Conversation(chatbot, chatbot.default_settings())
    frames = [frame for frame in conversation.ask(arguments.question)[0] if frame.kind != "prefill"]
    count = min(arguments.frames, len(frames))
    picked = [frames[round(index * (len(frames) - 1) / max(count - 1, 1))] for index in range(count)]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    last = frames[-1]
    footer = f"{last.num_tokens} tokens in {last.steps} denoising steps ({last.tokens_per_step:.2f} tokens/step)"
    strip(picked, arguments.question, footer).save(arguments.output)
    print(f"{arguments.output}: {count} of {len(frames)} frames; {last.text!r}")


if __name__ == "__main__":
    main()
