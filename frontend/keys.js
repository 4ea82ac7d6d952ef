// Keys of the page: "/" and the skip link go to the question box, which has the focus again when an answer is over; F1
// shows the help of the control that has the focus, and `aria-keyshortcuts` says so. Out of the Tab order are the help
// buttons, for they double the stops, and a collapsed sidebar, for nobody sees where the focus is. What is typed in the
// box stays when the big screen brings another one. Runs once per page.
if (!window.kvArenaKeys) {
  window.kvArenaKeys = true;
  const TO_BOX = "Skip to the question", TO_MAIN = "Skip to main content";
  const HELP = '[data-testid="stTooltipIcon"] button', KEYED = '[class*="st-key-"]';
  const CONTROLS = 'input, textarea, button, [role="slider"], [role="combobox"]';
  const box = () => document.querySelector('[data-testid="stChatInputTextArea"]');
  const skipLink = () => document.querySelector('[data-testid="stSkipToContent"]');
  const size = () => getComputedStyle(document.documentElement).fontSize;
  let asked = false, seen = null, seenSize = "";

  document.addEventListener("keydown", (event) => {
    const at = document.activeElement;
    if (event.key === "Tab") asked = false;
    if (event.key === "Enter" && at === box()) asked = true;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "F1") {
      const help = at.closest(KEYED)?.querySelector(HELP);
      if (!help) return;
      event.preventDefault();
      help.focus();
    } else if (event.key === "/") {
      if (at.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(at.tagName)) return;
      event.preventDefault();
      asked = true; // also where the box is still to be drawn
      box()?.focus();
    }
  }, true);
  document.addEventListener("pointerdown", () => { asked = false; }, true);
  document.addEventListener("click", (event) => {
    if (event.target !== skipLink() || !box() || box().disabled) return;
    event.preventDefault();
    event.stopPropagation(); // Streamlit's own handler would go to the top
    box().focus();
  }, true);

  const order = () => {
    for (const help of document.querySelectorAll(`${HELP}:not([tabindex])`)) {
      help.tabIndex = -1;
      const keyed = help.closest(KEYED);
      for (const control of keyed?.querySelectorAll(CONTROLS) ?? []) {
        if (control.closest(KEYED) === keyed && !control.matches(HELP)) control.setAttribute("aria-keyshortcuts", "F1");
      }
    }
    const sidebar = document.querySelector('[data-testid="stSidebar"]');
    if (sidebar) sidebar.inert = sidebar.dataset.collapsed === "true";
    const label = skipLink()?.firstChild, text = box() && !box().disabled ? TO_BOX : TO_MAIN;
    if (label && label.nodeValue !== text) label.nodeValue = text;
  };
  const carry = (found) => {
    if (!found || found === seen) return;
    if (seen?.value && !found.value && size() !== seenSize) {
      Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "value").set.call(found, seen.value);
      found.dispatchEvent(new Event("input", { bubbles: true }));
    }
    [seen, seenSize] = [found, size()];
  };
  new MutationObserver(() => {
    order();
    const found = box();
    carry(found);
    if (asked && found && !found.disabled && document.activeElement === document.body) found.focus();
  }).observe(document.body, { subtree: true, childList: true, attributeFilter: ["disabled", "data-collapsed"] });
  order();
}
