"""Whether the page's texts stand out from their ground, as WCAG computes it."""

from __future__ import annotations

from playwright.sync_api import Page

LEAST = 4.5
_FAINT = """([elements, least]) => {
    const parse = (colour) => { const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
    const over = ([r, g, b, a], ground) => [r, g, b].map((value, i) => value * a + ground[i] * (1 - a));
    const linear = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const contrast = (element) => {
        const around = [];
        for (let at = element; at; at = at.parentElement) around.unshift(at);
        let ground = [255, 255, 255], opacity = 1;
        for (const at of around) {
            const style = getComputedStyle(at), [r, g, b, a] = parse(style.backgroundColor);
            opacity *= Number(style.opacity);
            ground = over([r, g, b, a * opacity], ground);
        }
        const [r, g, b, a] = parse(getComputedStyle(element).color);
        const [low, high] = [luminance(over([r, g, b, a * opacity], ground)), luminance(ground)].sort((x, y) => x - y);
        return (high + 0.05) / (low + 0.05);
    };
    const hasText = (e) => [...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const others = ":disabled *, [aria-disabled=true] *, [inert] *, [data-testid=stSlider] *";
    return [...document.querySelectorAll(elements)]
        .filter((e) => hasText(e) && e.checkVisibility({visibilityProperty: true, opacityProperty: true}))
        .filter((e) => !e.matches(`${others}, [data-testid=stIconMaterial]`))
        .map((e) => [contrast(e), e])
        .filter(([found]) => found < least)
        .map(([found, e]) => `${found.toFixed(2)} ${e.tagName} ${e.textContent.trim().slice(0, 40)}`);
}"""


def faint_texts(page: Page) -> list[str]:
    """But those of disabled controls, and a slider's value, which stands beside its knob and not on it."""
    found: list[str] = page.evaluate(_FAINT, ["body *:not(script, style)", LEAST])
    return found
