"""The parts of the page that Gradio has none for, as HTML: pictures, lists of pictures, what is said about an edit.

Addresses are relative to the page and served by `door.py`: no path of this machine is in them.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from ledits_min.app.web.models import EXAMPLES, SUGGESTIONS
from ledits_min.app.web.session import Edit, Picture, Remembered, Session, words

Entry = Edit | Remembered

# What an element does in the browser; `element` and `trigger` are Gradio's.
CHOOSE = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-index]');
  if (button) trigger('select', {index: Number(button.dataset.index)});
});
"""
COMPARE = """
element.addEventListener('input', event => {
  event.target.closest('.compare').style.setProperty('--at', event.target.value + '%');
});
"""
UPLOAD = """
const said = text => { element.querySelector('.sending').textContent = text; };
const send = async file => {
  if (!file) return;
  said('Sending ' + file.name + ' ...');
  try {
    const answer = await fetch('upload', {
      method: 'POST', body: file, headers: {'X-Name': encodeURIComponent(file.name || 'picture')},
    });
    if (!answer.ok) { said(await answer.text()); return; }
    said('');
    trigger('upload', {token: (await answer.json()).token});
  } catch (error) { said('The picture could not be sent: the page does not answer.'); }
};
element.addEventListener('change', event => { send(event.target.files[0]); event.target.value = ''; });
element.addEventListener('dragover', event => {
  event.preventDefault(); element.querySelector('label').classList.add('over');
});
element.addEventListener('dragleave', () => element.querySelector('label').classList.remove('over'));
element.addEventListener('drop', event => {
  event.preventDefault();
  element.querySelector('label').classList.remove('over');
  send(event.dataTransfer.files[0]);
});
document.addEventListener('paste', event => {
  if (element.checkVisibility() && event.clipboardData.files.length) send(event.clipboardData.files[0]);
});
"""


def address(path: Path, session: Session) -> str:
    return f"kept/{path.relative_to(session.place).as_posix()}"


def drop_box(most: int) -> str:
    return f"""<label class="drop-box"><input type="file" accept="image/*">
        <strong>Drop a picture here</strong><span>or press to choose one, up to {most // 2**20} MB</span>
        <span class="sending" role="status"></span></label>"""


def samples(count: int) -> str:
    buttons = (
        f'<li><button type="button" data-index="{index}" aria-label="Take drawn portrait {index + 1}">'
        f'<img src="samples/{index}.png" alt=""></button></li>'
        for index in range(count)
    )
    return f'<ul class="pictures">{"".join(buttons)}</ul>'


def examples() -> str:
    buttons = (
        f'<li><button type="button" data-index="{index}"><img src="samples/{each.sample}.png" alt="">'
        f"<span>{html.escape(each.text)}</span></button></li>"
        for index, each in enumerate(EXAMPLES)
    )
    return f'<ul class="pictures named">{"".join(buttons)}</ul>'


def suggestions() -> str:
    buttons = (
        f'<li><button type="button" data-index="{index}">{html.escape(text)}</button></li>'
        for index, text in enumerate(SUGGESTIONS)
    )
    return f'<p>The embedded model knows, among others:</p><ul class="chips">{"".join(buttons)}</ul>'


def compare(picture: Picture, session: Session, made: Edit | None = None) -> str:
    """Before and after under one slider; without an edit the picture alone."""
    width, height = picture.size
    shape = f"--at: 50%; --shape: {width} / {height}"
    name = html.escape(Path(picture.source).name)
    before = f'<img src="{address(picture.shown, session)}" alt="Before: {name}">'
    if made is None:
        return f'<figure class="compare" style="{shape}">{before}</figure>'
    return (
        f'<figure class="compare" style="{shape}">{before}'
        f'<img class="after" src="{address(made.shown, session)}" alt="After: {html.escape(made.label)}">'
        '<span class="tag" aria-hidden="true">before</span><span class="tag right" aria-hidden="true">after</span>'
        '<input type="range" min="0" max="100" value="50" aria-label="Where before ends and after begins"></figure>'
    )


def masks(made: Edit | None, session: Session) -> str:
    if made is None or not made.masks:
        return '<p class="hint">Each concept of an edit is shown here, and where it acted.</p>'
    figures = (
        f'<figure><img src="{address(mask.file, session)}" alt="Where {html.escape(concept.text)} acted">'
        f"<figcaption>{html.escape(words(concept))}: at most {100 * mask.most:.0f} %</figcaption></figure>"
        for concept, mask in zip(made.change.concepts, made.masks, strict=True)
    )
    return f'<div class="masks">{"".join(figures)}</div>'


def status(made: Edit) -> str:
    if made.inverted is None:
        times = f"Edited in {made.seconds:.1f} s; the inversion was reused."
    else:
        times = f"Inverted in {made.inverted:.1f} s, edited in {made.seconds:.1f} s; edits reuse the inversion."
    return f"<b>{html.escape(made.label)}</b><br>{times}"


def opened(picture: Picture) -> str:
    width, height = picture.size
    return f"{html.escape(Path(picture.source).name)}, {width} x {height}. Say what to add or remove."


def download(made: Edit | None, session: Session) -> str:
    if made is None:
        return ""
    name = html.escape(made.name)
    return f'<a class="take" href="{address(made.file, session)}" download="{name}">Download PNG</a>'


def history(entries: Sequence[Entry], session: Session, current: Entry | None) -> str:
    """The newest first."""
    if not entries:
        return ""
    buttons = (
        f'<li><button type="button" data-index="{index}"{" aria-current=true" * (each is current)} '
        f'aria-label="Back to: {html.escape(each.label)}" title="{html.escape(each.label)}">'
        f'<img src="{address(each.thumbnail, session)}" alt=""><span>{html.escape(each.label)}</span></button></li>'
        for index, each in enumerate(entries)
    )
    return f'<h2>History</h2><ul class="pictures named">{"".join(buttons)}</ul>'


def said(lines: Iterable[str], failed: bool = False) -> str:
    """What goes with an edit or a picture: a failure, or what should be known of it."""
    text = "".join(f"<p>{html.escape(line, quote=False)}</p>" for line in lines)
    role = "alert" if failed else "status"
    return f'<div class="said{" failed" * failed}" role="{role}">{text}</div>' if text else ""


def data_url(thumbnail: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(thumbnail.read_bytes()).decode()}"
