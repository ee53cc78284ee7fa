// Pixels as the network sees them: from base64, onto a canvas, and back into a PNG.

/** Decode a stream's `input`: `pixels` become bytes, H x W x C. */
export function fromWire({ height, width, channels, pixels }) {
  return { height, width, channels, pixels: Uint8Array.from(atob(pixels), (c) => c.charCodeAt(0)) };
}

/** Make what a canvas takes. */
export function imageData({ height, width, channels, pixels }, negative = false) {
  const data = new ImageData(width, height);
  for (let i = 0; i < width * height; i += 1) {
    for (let c = 0; c < 3; c += 1) {
      const value = pixels[i * channels + (channels === 3 ? c : 0)];
      data.data[4 * i + c] = negative ? 255 - value : value;
    }
    data.data[4 * i + 3] = 255;
  }
  return data;
}

/** Make a PNG that the service turns into these very pixels; `invert` is the model's. */
export function toPng(input, invert) {
  const canvas = new OffscreenCanvas(input.width, input.height);
  canvas.getContext("2d").putImageData(imageData(input, invert), 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}
