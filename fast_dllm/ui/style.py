"""The page's looks, light and dark, wide and on a phone, and the two scripts that run in the browser.

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
.legend span{white-space:nowrap;margin-right:.9em}
.legend summary{cursor:pointer}
.err{color:#b91c1c;font-weight:600}
.dark .err{color:#fca5a5}
#told:not(:has(.note)),#told-compare:not(:has(.note)){display:none}
.layers .scroll{overflow-x:auto;padding:4px 0}
.layers svg{display:block}
.layers text{font:9px ui-monospace,monospace;fill:currentColor;opacity:.8}
.layers line{pointer-events:none;stroke:var(--background-fill-primary);stroke-width:1}
.layers g{cursor:pointer}
.layers .at{fill:none;pointer-events:none;stroke:#dc2626;stroke-width:2}
table.both{width:100%;border-collapse:collapse;font-size:14px;margin:.4em 0}
table.both th,table.both td,table.both tr{border:0 !important}
table.both th,table.both td{text-align:right;padding:2px 8px}
table.both td{border-top:1px solid var(--border-color-primary) !important}
@media (max-width:640px){
  .legend span{white-space:normal}
  #talking{flex-direction:column;flex-wrap:nowrap}
  #left,#right{display:contents}
  #talk{order:1;height:220px !important}
  #cells{order:2}
  #told{order:3}
  .form:has(#message){order:4}
  #buttons{order:5}
  #replaying{order:6}
  #layers{order:7}
  #legend{order:8}
  #examples{order:9}
  #sides{flex-direction:column}
  table.both{font-size:11px}
  table.both th,table.both td{padding:2px 3px !important}
}
"""

# a tap on a column of the layer view goes to that forward
CHOOSE_STEP = """
element.addEventListener('click', event => {
  const column = event.target.closest('[data-step]');
  if (column) trigger('click', {step: Number(column.dataset.step)});
});
"""

# navigator.clipboard is there on https and on this machine alone; a page in the local network takes the old way
COPY_ANSWER = """
async messages => {
  const answers = messages.filter(message => message.role === 'assistant');
  if (!answers.length) return;
  const text = answers[answers.length - 1].content;
  if (navigator.clipboard) return void await navigator.clipboard.writeText(text);
  const area = document.body.appendChild(document.createElement('textarea'));
  area.value = text;
  area.select();
  document.execCommand('copy');
  area.remove();
}
"""
