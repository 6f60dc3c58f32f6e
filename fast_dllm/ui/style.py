"""The page's looks, light and dark, wide and on a phone, and the scripts that run in the browser.

Gradio puts a prefix behind every comma of a selector, so that none may stand within :has() or :not().
"""

STYLE = """
.cells{font-family:ui-monospace,monospace;font-size:14px;line-height:2.1;overflow-wrap:anywhere;min-height:6em}
.c{display:inline-block;min-width:.7em;border-radius:4px;margin:0 1px;padding:0 2px;white-space:pre;line-height:1.5;
   font-style:normal;color:#111827;background:#f1f5f9;position:relative;unicode-bidi:isolate}
.cells b{font:600 14px/1.5 system-ui,sans-serif;display:block;margin-bottom:.4em}
#buttons button,#play{white-space:nowrap;font-size:15px;padding-left:6px;padding-right:6px}
.num{white-space:nowrap;margin:0 1px}
.num .c{margin:0;border-radius:0}
.blk{border-left:3px solid #6366f1;margin:0 3px 0 2px;padding:.2em 0}
.sub{border-left:2px dotted #94a3b8;margin:0 2px 0 1px;padding:.2em 0}
.c.m{background:#cbd5e1;color:#64748b}
.c.m.on{background:#a5b4fc;color:#4338ca}
.c.new{outline:2px solid #111827;font-weight:600;z-index:1}
.dark .c.new{outline-color:#f8fafc}
.c.diff{box-shadow:0 0 0 3px #dc2626;z-index:1}
.c[data-sure]:hover::after,.c[data-sure]:focus::after{content:attr(data-sure);position:absolute;left:0;bottom:100%;
   background:#111827;color:#fff;font:12px/1.6 system-ui,sans-serif;padding:0 6px;border-radius:4px;z-index:9}
.stats{font-size:13px;line-height:1.5;opacity:.85;margin-top:.6em}
.legend{font-size:12px;line-height:2;opacity:.9}
.legend span{display:inline-block;max-width:100%;margin-right:.9em}
.legend summary,.cells b{overflow-wrap:anywhere}
.legend summary{cursor:pointer}
.err{color:#b91c1c;font-weight:600}
.dark .err{color:#fca5a5}
#note:not(:has(.note)),#note-compare:not(:has(.note)){display:none}
.layers .scroll{overflow-x:auto;padding:4px 0}
.layers svg{display:block}
.layers text{font:9px ui-monospace,monospace;fill:currentColor;opacity:.8}
.guesses{font-size:13px;line-height:1.7;margin-top:.6em}
.guess[data-result="used"] .c{background:#a7f3d0}
.layers line{pointer-events:none;stroke:var(--background-fill-primary);stroke-width:1}
.layers g{cursor:pointer}
.layers .at{fill:none;pointer-events:none;stroke:#dc2626;stroke-width:2}
table.both{width:100%;border-collapse:collapse;font-size:14px;margin:.4em 0}
table.both th,table.both td,table.both tr{border:0 !important}
table.both th,table.both td{text-align:right;padding:2px 8px}
table.both td{border-top:1px solid var(--border-color-primary) !important}
.layers g:focus:not(:focus-visible){outline:none}
.layers g:focus-visible,.c:focus-visible{outline:2px solid #dc2626;outline-offset:1px}
#talk:not(:has(.message)){display:none}
#talk button[aria-label="Clear"]{display:none}
.gradio-container{--block-info-text-color:#4b5563}
.dark .gradio-container,.gradio-container.dark{--block-info-text-color:#d1d5db}
#send,#compare{background:#c2410c;color:#fff}
#stop:enabled,#stop-compare:enabled{background:#b91c1c;color:#fff}
#stop:disabled,#stop-compare:disabled{background:#e5e7eb;color:#374151;opacity:1}
@media (max-width:760px){
  #talking{flex-direction:column;flex-wrap:nowrap}
  #left,#right{display:contents}
  #talk{order:1;height:220px !important}
  .form:has(#message){order:2}
  #note{order:3}
  #buttons{order:4}
  #examples{order:5}
  #replaying{order:6}
  #cells{order:7}
  #layers{order:8}
  #legend{order:9}
  #sides{flex-direction:column}
  table.both{font-size:11px}
  table.both th,table.both td{padding:2px 3px !important}
}
"""

# A tap on a column of the layer view, or an arrow key within it, goes to that forward. The marked column is brought
# into sight, and keeps the focus where a key chose it.
CHOOSE_STEP = """
const choose = column => column && trigger('click', {step: Number(column.dataset.step)});
let byKey = false;
element.addEventListener('click', event => choose(event.target.closest('[data-step]')));
element.addEventListener('keydown', event => {
  const column = event.target.closest('[data-step]');
  const next = {ArrowRight: 'nextElementSibling', ArrowLeft: 'previousElementSibling'}[event.key];
  if (!column || !next) return;
  event.preventDefault();
  const goal = column[next];
  if (!goal || !goal.matches('[data-step]')) return;
  byKey = true;
  choose(goal);
});
new MutationObserver(() => {
  const marked = element.querySelector("g[tabindex='0']");
  const frame = element.querySelector('.scroll');
  if (!marked || !frame) return;
  const [column, sight] = [marked.getBoundingClientRect(), frame.getBoundingClientRect()];
  if (column.right + 6 > sight.right) frame.scrollLeft += column.right + 6 - sight.right;
  if (column.left - 6 < sight.left) frame.scrollLeft -= sight.left - column.left + 6;
  if (byKey) marked.focus();
  byKey = false;
}).observe(element, {childList: true, subtree: true, attributes: true, attributeFilter: ['tabindex']});
"""

# the arrow keys go from token to token; the focus shows how sure the model was
WALK_TOKENS = """
element.addEventListener('keydown', event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step || !event.target.matches('[data-sure]')) return;
  event.preventDefault();
  const tokens = [...element.querySelectorAll('[data-sure]')];
  const next = tokens[tokens.indexOf(event.target) + step];
  if (next) next.focus();
});
"""

# brings the tokens into sight where the page is longer than the screen
SHOW_TOKENS = """
() => {
  const place = document.getElementById('replaying').getBoundingClientRect();
  if (place.top < 0 || place.top > window.innerHeight / 2)
    document.getElementById('replaying').scrollIntoView({block: 'start'});
}
"""

# The conversation in the browser: of one tab, for as long as the tab is open. A page that has just been loaded has an
# empty one, which is not kept.
KEEP_MESSAGES = """
messages => { if (messages && messages.length) sessionStorage.setItem('conversation', JSON.stringify(messages)); }
"""
FORGET_MESSAGES = "() => { sessionStorage.removeItem('conversation'); }"
RECALL_MESSAGES = """
() => {
  try { return [JSON.parse(sessionStorage.getItem('conversation')) || []]; } catch { return [[]]; }
}
"""

# Copies the last answer and gives the button's next text. navigator.clipboard is there on https and on this machine
# alone; a page in the local network takes the old way.
COPY_ANSWER = """
async messages => {
  const answers = (messages || []).filter(message => message.role === 'assistant');
  if (!answers.length) return 'Nothing yet';
  const text = answers[answers.length - 1].content;
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return 'Copied';
  }
  const area = document.body.appendChild(document.createElement('textarea'));
  area.value = text;
  area.select();
  const copied = document.execCommand('copy');
  area.remove();
  return copied ? 'Copied' : 'Not copied';
}
"""
COPY_AGAIN = "() => new Promise(show => setTimeout(() => show('Copy'), 1500))"
