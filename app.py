"""predict.py for people without a terminal: a page on their own machine.

    python app.py [CHECKPOINT]        opens http://127.0.0.1:7860; CHECKPOINT is results/student_acdc7.pt
    python app.py --host 0.0.0.0      for others on the network too, without a password

Drop a NIfTI file, 3D or 4D, or take the synthetic cine: what predict_file makes of it is shown and can be saved.
Nothing leaves the machine: no telemetry, and POLICY keeps the browser from what the library might fetch elsewhere. An
upload goes once it is segmented, its results with the page or the next upload. One scan at a time; others wait.
"""
import importlib.util
import os
import signal
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")                                   # as predict.py
    if not importlib.util.find_spec("gradio"):
        print("app.py: wants the package gradio: pip install 'gradio>=6.31,<7'", file=sys.stderr)
        sys.exit(2)

import gradio as gr

import data_prep
import evaluate
import models
import phantom
import predict

MAX_MB, PAGES = 500, 16                              # of an upload; open pages whose scan is kept, the latest
CSS = "#message textarea {color: #c2410c; font-weight: bold} #image img {width: 100%}"
POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'self' data: blob: 'unsafe-inline'">"""
CINE = """&nbsp; | EDV, ml | ESV, ml | EF, %
---|---|---|---
LV | {lv_edv} | {lv_esv} | {lv_ef}
RV | {rv_edv} | {rv_esv} | {rv_ef}

Mass of the myocardium {myo_mass} g. ED is frame {ED}, ES frame {ES} of {frames}."""
STILL = "RV, ml | MYO, ml | LV, ml\n---|---|---\n{rv_ml} | {myo_ml} | {lv_ml}"


class Fields(data_prep.Parser):
    """predict.py's command line, where an error is a DataError with the same line and not the end."""

    def exit(self, status=0, message=None):
        raise data_prep.DataError(str(message).strip().removeprefix("predict.py: "))


def header_options(source, spacing, axes):
    """What the two fields hold, empty where the header tells -> predict_file's arguments. Raises DataError."""
    argv = ["CHECKPOINT", str(source)]
    argv += ["--spacing", *spacing.split(maxsplit=2)] if spacing.strip() else []
    argv += ["--axes", axes.strip()] if axes.strip() else []
    args = predict.parse(argv, Fields)
    return dict(spacing=args.spacing, axes=args.axes)


def segment(nets, checkpoint, source, folder, spacing="", axes=""):
    """predict_file's results in a TemporaryDirectory, which the scan keeps, and NAME_table.csv -> a scan: stem; row;
    `shown`: images and labels (T, Z, Y, X), spacing (z, y, x) in mm. Raises as predict_file."""
    stem = f"{folder.name}/{predict.NIFTI.sub('', source.name)}"
    options = header_options(source, spacing, axes) | dict(usual=checkpoint.get("entropy", predict.USUAL))
    row, scan, labels = predict.predict_file(nets, source, Path(stem), checkpoint["inference"], **options)
    row = row | dict(file=source.name)
    evaluate.write_csv(f"{stem}_table.csv", [{c: row.get(c) for c in predict.COLUMNS}])
    return SimpleNamespace(folder=folder, stem=stem, row=row, shown=(scan.frames, labels, scan.spacing))


def outputs(scan):
    """What the page's outputs become, in the order of build's `options`."""
    row, labels, note = scan.row, scan.shown[1], scan.row.get("warning")
    frame, (frames, levels) = row.get("ED", 1), labels.shape[:2]
    level = evaluate.three_slices(labels[frame - 1] > 0)[1] + 1
    text = CINE if "ED" in row else STILL if frames == 1 else "No two frames with a left ventricle: no ED, no ES."
    numbers = {k: evaluate.format_number(1, v) for k, v in row.items() if isinstance(v, float)}
    sliders = [gr.Slider(value=k, maximum=max(n, 2), visible=n > 1) for k, n in ((level, levels), (frame, frames))]
    return [None, gr.Textbox(note, visible=bool(note)), gr.Column(visible=True),
            evaluate.draw_slice(*scan.shown, frame - 1, level - 1), *sliders, True, False,
            ("`{file}`\n\n" + text).format(**row | numbers),
            gr.Image(f"{scan.stem}_volumes.png" if frames > 1 else None, visible=frames > 1),
            f"{scan.stem}_seg.nii.gz", f"{scan.stem}_table.csv", "", ""]


def build(nets, checkpoint, root):
    """The page -> gradio.Blocks. Files are kept below `root`."""
    kept, waiting = {}, Counter()                    # {page: scan}, {uploaded file: how many pages wait for it}

    def take(file, request: gr.Request, spacing="", axes="", progress=gr.Progress(track_tqdm=True)):   # noqa: B008
        """An uploaded file, or None for the synthetic cine. What was shown goes, also where the file is bad; the fields
        are emptied once a file is segmented, or they would spoil the next."""
        kept.pop(request.session_hash, None)
        folder = tempfile.TemporaryDirectory(dir=root)                                 # goes with the scan
        source = Path(file or f"{folder.name}/synthetic_cine.nii.gz")
        try:
            if not file:
                phantom.write_cine(source)
            scan = kept[request.session_hash] = segment(nets, checkpoint, source, folder, spacing, axes)
        except Exception as error:                                 # as predict.attempt
            line = predict.describe_error(source, error).replace(f"{source.parent}{os.sep}", "")
            return [None, gr.Textbox(line, visible=True), gr.Column(visible=False), *[gr.skip()] * 11]    # these stay
        finally:
            waiting[file] -= 1
            if waiting[file] < 1:
                source.unlink(missing_ok=True)
        if len(kept) > PAGES:
            kept.pop(next(iter(kept)))
        return outputs(scan)

    def view(level, frame, outline, whole, request: gr.Request):
        scan = kept.get(request.session_hash)
        return evaluate.draw_slice(*scan.shown, frame - 1, level - 1, outline, whole) if scan else None

    def close(request: gr.Request):
        kept.pop(request.session_hash, None)

    with gr.Blocks(title="ACT-Net", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# Cardiac MRI, short axis\n**{evaluate.NOTICE}** Files stay on the machine that serves the page.")
        drop = gr.File(label=f"A NIfTI file, 3D or 4D, at most {MAX_MB} MB", height=140, elem_id="drop")
        synthetic = gr.Button("Take a synthetic scan")
        with gr.Accordion("The header is wrong or silent: fill in, then drop the file", open=False), gr.Row():
            spacing = gr.Textbox("", label="--spacing Z Y X", info="mm between slices, of a pixel", elem_id="spacing")
            axes = gr.Textbox("", label="--axes", info="the array's in their order, as xyzt", elem_id="axes")
        message = gr.Textbox(label="Look here (--options: above, or of predict.py)", visible=False, elem_id="message")
        with gr.Column(visible=False) as results, gr.Row():
            with gr.Column():
                image = gr.Plot(format="png", show_label=False, container=False, elem_id="image")
                level, frame = (gr.Slider(1, 2, step=1, precision=0, label=k, elem_id=k) for k in ("slice", "frame"))
                outline, whole = gr.Checkbox(True, label="outline"), gr.Checkbox(label="whole slice")
            with gr.Column():
                numbers = gr.Markdown(elem_id="numbers")
                curve = gr.Image(show_label=False, container=False, buttons=[], interactive=False, elem_id="curve")
                labels, table = gr.DownloadButton("Label map (NIfTI)"), gr.DownloadButton("Table (CSV)")
        options = dict(concurrency_id="network", trigger_mode="multiple", show_progress_on=drop, outputs=[
            drop, message, results, image, level, frame, outline, whole, numbers, curve, labels, table, spacing, axes])
        drop.upload(lambda file: waiting.update([file]), drop, queue=False, show_progress="hidden")
        drop.upload(take, [drop, spacing, axes], **options)
        synthetic.click(take, gr.State(), **options)
        gr.on([c.input for c in (level, frame, outline, whole)], view, [level, frame, outline, whole], image,
              trigger_mode="always_last", show_progress="hidden", concurrency_limit=None)
        page.unload(close)
    return page


def check_host(host):
    """DataError unless this machine can listen there; the library would try for minutes."""
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except (OSError, UnicodeError) as error:
        raise data_prep.DataError(f"--host {host}: {data_prep.one_line(error)}; give 0.0.0.0, or an address of this "
                                  "machine") from None


def serve(args):
    check_host(args.host or "127.0.0.1")
    nets, checkpoint = evaluate.load_networks(args.checkpoint, models.pick_device())
    with tempfile.TemporaryDirectory(prefix="actnet-", ignore_cleanup_errors=True) as root:
        os.environ["GRADIO_TEMP_DIR"] = root
        os.environ["no_proxy"] = "*"                                # it asks this machine whether its page is there
        page = build(nets, checkpoint, root).queue(max_size=20)
        _, url, _ = page.launch(server_name=args.host, inbrowser=not args.no_browser, share=False, quiet=True, css=CSS,
                                head=POLICY, max_file_size=f"{MAX_MB}mb", footer_links=[], run_history=False,
                                enable_monitoring=False, prevent_thread_lock=True)
        print(f"{url} is the page; Ctrl-C ends it", flush=True)
        page.block_thread()


def main(argv=None):
    parser = data_prep.Parser(prog="app.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", type=Path, default="results/student_acdc7.pt", help="[%(default)s]")
    parser.add_argument("--host", metavar="ADDRESS", help="where to listen [127.0.0.1: this machine alone]")
    parser.add_argument("--no-browser", action="store_true", help="do not open it")
    args = parser.parse_args(argv)
    return data_prep.exit_code("app.py", lambda: serve(args), (models.CheckpointError, models.DeviceError))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))                            # so that temporary folders go
    sys.exit(main())
