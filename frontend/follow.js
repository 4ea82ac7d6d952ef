// Follows the newest turn. Its question comes below the verdict when it is asked here or the page is loaded, then the
// answers' newest words stay in sight, until the reader scrolls up. Whoever scrolls to the page's end stays there.
// Fits the verdict into a quarter of the window, and puts a token's bubble where its box has room. Runs once per page.
if (!window.kvArenaFollow) {
  window.kvArenaFollow = true;
  const GAP_PX = 8, INPUT_MS = 300, VERDICT_SHARE = 0.25;
  const root = document.documentElement;
  const find = (selector) => document.querySelector(selector);
  const all = (selector, place = document) => [...place.querySelectorAll(selector)];
  const main = () => find('[data-testid="stMain"]');
  const isLive = () => Boolean(find(".st-key-stop"));
  let turn = null, asked = true, held = "", followed = false, isBelow = false, inputMs = 0, frame = 0;
  let last = { top: 0, height: 0, at: 0 };

  // The turn's first line: the question, or the divider that stands directly above it.
  const headOf = () => {
    const question = all(".ka-question").at(-1)?.closest('[data-testid="stElementContainer"]');
    const above = question?.previousElementSibling;
    return above?.querySelector(".ka-divider") ? [above, question] : [question, question];
  };

  const edges = () => {
    const bar = find(".st-key-verdict, .st-key-slots")?.parentElement;
    const isSticky = bar && getComputedStyle(bar).position === "sticky";
    const top = find(".stAppHeader").getBoundingClientRect().bottom + (isSticky ? bar.offsetHeight : 0);
    return { top, bottom: find(".stBottom")?.getBoundingClientRect().top ?? innerHeight };
  };

  const remember = () => {
    const [, question] = headOf();
    last = { top: main().scrollTop, height: main().scrollHeight, at: question?.getBoundingClientRect().top ?? 0 };
  };

  // How far the page is from its place; null: it may stay.
  const distance = () => {
    const [first, question] = headOf(), { top, bottom } = edges();
    if (!question) return null;
    const height = question.getBoundingClientRect().bottom - first.getBoundingClientRect().top;
    const head = height + 2 * GAP_PX < bottom - top ? first : question;
    const words = all('[class*="st-key-turn-"]').at(-1)?.querySelectorAll(".ka-state-streaming .ka-answer") ?? [];
    if (!words.length && followed) return null;
    const toHead = head.getBoundingClientRect().top - top - GAP_PX;
    const toWords = Math.max(...[...words].map((one) => one.getBoundingClientRect().bottom + GAP_PX - bottom));
    if (toWords <= toHead) return toHead;
    followed = true;
    return Math.max(toWords, question.getBoundingClientRect().bottom - top); // past the whole question, not half of it
  };

  const place = () => {
    if (held === "end" && !isLive()) main().scrollTop = main().scrollHeight;
    if (held !== "turn") return;
    const by = distance();
    if (by === null) return;
    if (by > 1 || (by < -1 && !isBelow)) main().scrollTop += by;
    if (by > 1) isBelow = false;
  };

  // The verdict in full, else a line each, else a part that scrolls and says so.
  const fitVerdict = () => {
    const bar = find(".st-key-verdict")?.parentElement, limit = VERDICT_SHARE * innerHeight;
    delete root.dataset.verdict;
    if (!bar || bar.scrollHeight <= limit) return;
    root.dataset.verdict = "compact";
    if (bar.scrollHeight > limit) root.dataset.verdict = "compact scrolls";
  };

  const step = () => {
    frame = 0;
    if (!main()) return;
    fitVerdict();
    root.style.setProperty("--ka-top", `${edges().top + GAP_PX}px`);
    const newest = all('[class*="st-key-turn-"]').at(-1)?.className.match(/st-key-(turn-\d+)/)[1] ?? null;
    if (newest !== turn) {
      if (asked || held) held = "turn";
      asked = newest === null;
      followed = isBelow = false;
      turn = newest;
    }
    place();
    remember();
  };
  const stepSoon = () => { frame ||= requestAnimationFrame(step); };

  // By hand, and not because the layout changed.
  const isReaders = () => {
    const scrolled = main().scrollTop - last.top, moved = (headOf()[1]?.getBoundingClientRect().top ?? 0) - last.at;
    if (Math.abs(scrolled) <= 1 || main().scrollHeight < last.height) return false;
    return Math.abs(scrolled + moved) < 2 || performance.now() - inputMs < INPUT_MS;
  };
  document.addEventListener("scroll", (event) => {
    if (event.target !== main()) return;
    if (isReaders()) {
      const { scrollTop, scrollHeight, clientHeight } = main(), by = distance() ?? 0;
      const isAtEnd = scrollHeight - scrollTop - clientHeight < 2;
      held = isLive() ? (by <= 2 ? "turn" : "") : isAtEnd ? "end" : "";
      isBelow = by < -2;
    }
    remember();
  }, { capture: true, passive: true });
  for (const kind of ["wheel", "touchmove"]) {
    document.addEventListener(kind, () => { inputMs = performance.now(); }, { capture: true, passive: true });
  }

  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches('[data-testid="stChatInputTextArea"]')) asked = true;
  }, true);
  document.addEventListener("click", (event) => {
    if (event.target.closest(".stMain button")) asked = true;
  }, true);
  document.addEventListener("focusin", (event) => {
    const tokens = event.target.closest(".ka-tokens"), box = tokens?.getBoundingClientRect();
    if (!tokens || event.target === tokens) return;
    const { dataset, style } = event.target, token = event.target.getBoundingClientRect();
    const isLow = token.top - box.top > box.height / 2;
    dataset.bubble = `${isLow ? "above" : "below"} ${token.left - box.left > box.width / 2 ? "left" : "right"}`;
    style.setProperty("--top", `${(isLow ? token.top : token.bottom) - box.top + tokens.scrollTop}px`);
    style.setProperty("--left", `${token.left - box.left}px`);
    style.setProperty("--right", `${box.right - token.right}px`);
  });
  addEventListener("resize", stepSoon);
  new MutationObserver(stepSoon).observe(document.body, { subtree: true, childList: true, characterData: true });
  stepSoon();
}
