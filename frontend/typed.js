// Tells the page what stands in the question box, whenever the typing pauses: the box itself says nothing before Enter.
const PAUSE_MS = 300;
const MAX_CHARS = 20000; // of more, nothing is told before it is asked

export default function ({ parentElement, setStateValue }) {
  parentElement.kvArenaStop?.(); // drawn anew in place
  let timer, told = "";
  const box = () => document.querySelector('[data-testid="stChatInputTextArea"]');
  const tell = () => {
    const typed = box()?.value.trim() ?? "";
    const text = typed.length > MAX_CHARS ? "" : typed;
    if (text !== told) setStateValue("text", told = text);
  };
  const wait = (event) => {
    if (event.target !== box()) return;
    clearTimeout(timer);
    timer = setTimeout(tell, PAUSE_MS);
  };
  document.addEventListener("input", wait);
  if (box()?.value) timer = setTimeout(tell, PAUSE_MS);
  return parentElement.kvArenaStop = () => {
    clearTimeout(timer);
    document.removeEventListener("input", wait);
  };
}
