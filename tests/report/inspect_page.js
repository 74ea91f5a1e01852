// Evaluated in a loaded page; returns what browser.py's PageFacts holds.
(async () => {
  await document.fonts.ready;
  const TOUCH = 1.5; // pixels by which boxes may meet: rounding, and glyphs that reach beyond their advance width
  const INK = 0.2; // share of a line box above and below its letters

  // What is left of a box after every ancestor that scrolls or hides its overflow has cut it.
  function visiblePart(box, element) {
    for (let node = element; node && node !== document.documentElement; node = node.parentElement) {
      const style = getComputedStyle(node);
      if (style.visibility === "hidden" || style.display === "none" || style.opacity === "0") return null;
      const clips = (style.overflowX !== "visible" || style.overflowY !== "visible") && !(node instanceof SVGElement);
      if (!clips) continue;
      const frame = node.getBoundingClientRect();
      box = {
        left: Math.max(box.left, frame.left), right: Math.min(box.right, frame.right),
        top: Math.max(box.top, frame.top), bottom: Math.min(box.bottom, frame.bottom),
      };
      if (box.left >= box.right || box.top >= box.bottom) return null;
    }
    return box;
  }

  const texts = [];
  const clipped = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const text = node.textContent.trim().replace(/\s+/g, " ").slice(0, 60);
    const parent = node.parentElement;
    if (!text || parent.closest("script, style, title, desc, template")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const rect of range.getClientRects()) {
      if (rect.width < 1 || rect.height < 1) continue;
      const inset = parent instanceof SVGElement ? 0 : INK * rect.height;
      const whole = { left: rect.left, right: rect.right, top: rect.top + inset, bottom: rect.bottom - inset };
      const picture = parent.closest("svg");
      if (picture) {
        const frame = picture.getBoundingClientRect();
        const outside = Math.max(
          frame.left - rect.left, rect.right - frame.right, frame.top - rect.top, rect.bottom - frame.bottom);
        if (outside > TOUCH) clipped.push(text);
      }
      const box = visiblePart(whole, parent);
      if (box) texts.push({ node, text, ...box });
    }
  }

  texts.sort((a, b) => a.top - b.top);
  const overlaps = new Set();
  for (let i = 0; i < texts.length; i++) {
    for (let j = i + 1; j < texts.length && texts[j].top < texts[i].bottom - TOUCH; j++) {
      const [a, b] = [texts[i], texts[j]];
      const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (a.node !== b.node && width > TOUCH && height > TOUCH) overlaps.add(`${a.text} | ${b.text}`);
    }
  }

  const pictures = [...document.querySelectorAll("img, svg, canvas")];
  const emptyPictures = pictures.filter((picture) => {
    const box = picture.getBoundingClientRect();
    const isBroken = picture instanceof HTMLImageElement && !(picture.complete && picture.naturalWidth > 0);
    const isBlank = picture instanceof SVGElement && picture.childElementCount === 0;
    return box.width < 1 || box.height < 1 || isBroken || isBlank;
  });

  const page = document.documentElement;
  return {
    width: page.clientWidth,
    height: page.scrollHeight,
    numTexts: texts.length,
    numPictures: pictures.length,
    overflowPixels: Math.max(0, page.scrollWidth - page.clientWidth),
    overlaps: [...overlaps],
    clipped,
    emptyPictures: emptyPictures.map((picture) => picture.getAttribute("src") || picture.id || picture.tagName),
  };
})()
