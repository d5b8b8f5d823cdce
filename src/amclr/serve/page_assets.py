"""Styles, templates and scripts of the page, which Gradio puts into the browser."""

CSS = """
.gradio-container { width: 100%; max-width: 1200px !important; margin: auto; }
#head > div, #image > div, #hits > div { margin: 0; padding: 0; }
#head h1 { margin: .4rem 0 0; font-size: 1.5rem; } #head p { margin: 0; opacity: .7; }
#again { max-width: 24rem; margin: auto; }
"""

HITS = """
.said { margin: .2rem 0 .8rem; }
.hint { padding: 2.5rem 1rem; text-align: center; opacity: .75; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 14px;
     grid-template-columns: repeat(auto-fill, minmax(min(160px, 45%), 1fr)); }
li { margin: 0; display: flex; flex-direction: column; border: 1px solid var(--border-color-primary);
     border-radius: 8px; overflow: hidden; background: var(--block-background-fill); }
li img { width: 100%; aspect-ratio: 4 / 3; object-fit: contain; background: var(--background-fill-secondary);
         margin: 0; }
li div { padding: 6px 9px; flex: 1; min-width: 0; font-size: .85rem; line-height: 1.35; overflow-wrap: anywhere; }
.line { display: flex; gap: .6em; margin: 0; }
.line b { flex: none; font-variant-numeric: tabular-nums; }
.line span { opacity: .65; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.said-of { margin: .25rem 0 0; display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical;
           overflow: hidden; }
button { border: 0; border-top: 1px solid var(--border-color-primary); padding: 8px; cursor: pointer;
         background: none; color: var(--link-text-color); font: inherit; font-size: .85rem; }
button:hover, button:focus-visible { background: var(--background-fill-secondary); }
"""

MORE_LIKE = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-row]');
  if (button) trigger('select', {row: Number(button.dataset.row)});
});
"""

DROP = """
<label class="${value ? 'has' : ''}" tabindex="0">
  <input type="file" accept="image/*" aria-label="Image to search by" tabindex="-1">
  ${value ? '<img alt="the query image" src="' + value + '">'
          : '<span>Drop an image here, paste one, or <u>choose a file</u></span>'}
</label>
${value ? '<button type="button" aria-label="Remove the image">&#10005;</button>' : ''}
"""

DROP_CSS = """
position: relative;
label { display: flex; align-items: center; justify-content: center; min-height: 148px; box-sizing: border-box;
        border: 2px dashed var(--border-color-primary); border-radius: 8px; cursor: pointer; padding: 6px;
        text-align: center; }
@media (max-width: 640px) { label { min-height: 72px; } }
label.over, label:hover, label:focus-visible { border-color: var(--color-accent); }
label.has { border-style: solid; }
input { position: absolute; opacity: 0; width: 1px; height: 1px; }
img { max-height: 140px; max-width: 100%; object-fit: contain; margin: 0; }
button { position: absolute; top: 6px; right: 6px; border-radius: 99px; width: 28px; height: 28px; cursor: pointer;
         border: 1px solid var(--border-color-primary); background: var(--block-background-fill);
         color: var(--body-text-color); }
"""

TAKE_IMAGE = """
const side = 1024;
async function take(file) {
  if (!file) return;
  try {  // photographs are sent no larger than the model needs them
    const image = await createImageBitmap(file);
    const scale = Math.min(1, side / Math.max(image.width, image.height));
    const canvas = document.createElement('canvas');
    canvas.width = Math.max(1, Math.round(image.width * scale));
    canvas.height = Math.max(1, Math.round(image.height * scale));
    const brush = canvas.getContext('2d');
    brush.fillStyle = 'white';
    brush.fillRect(0, 0, canvas.width, canvas.height);
    brush.drawImage(image, 0, 0, canvas.width, canvas.height);
    props.value = canvas.toDataURL('image/jpeg', 0.92);
  } catch {  // the server may read what the browser cannot, or says why not
    props.value = await new Promise(done => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.readAsDataURL(file);
    });
  }
  trigger('upload');
}
element.addEventListener('change', event => {
  if (event.target.type === 'file') take(event.target.files[0]);
});
element.addEventListener('click', event => {
  if (event.target.closest('button')) { event.preventDefault(); props.value = ''; trigger('clear'); }
});
element.addEventListener('keydown', event => {
  if (event.target.tagName === 'LABEL' && (event.key === 'Enter' || event.key === ' ')) {
    event.preventDefault();
    element.querySelector('input').click();
  }
});
for (const kind of ['dragover', 'dragleave', 'drop']) element.addEventListener(kind, event => {
  event.preventDefault();
  element.querySelector('label').classList.toggle('over', kind === 'dragover');
  if (kind === 'drop') take([...event.dataTransfer.files].find(f => f.type.startsWith('image/')));
});
document.addEventListener('paste', event => {
  const file = [...event.clipboardData.files].find(f => f.type.startsWith('image/'));
  if (file) { event.preventDefault(); take(file); }
});
"""
