"""app.py in a real browser, headless: a cine, controls, downloads, bad files, two pages at once, what is fetched."""
import gzip
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from urllib.parse import urlparse

import nibabel as nib
import numpy as np
import pytest
from conftest import CHROMIUM, ROOT, STUDENT, one_line, python, read_csv
from PIL import Image
from test_evaluate import painted

import evaluate
import phantom
import predict

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
WAIT = 60_000                                                       # ms, on a machine that does much else
ABSENT = [name for name in ("gradio", "playwright") if not find_spec(name)]
pytestmark = [pytest.mark.skipif(not CHROMIUM, reason="no chromium: apt-get install chromium"),
              pytest.mark.skipif(bool(ABSENT), reason=f"pip install {' '.join(ABSENT)}")]


@pytest.fixture(scope="module")
def cine(tmp_path_factory):
    """A synthetic cine of three frames."""
    path = tmp_path_factory.mktemp("scans") / "heart.nii.gz"
    phantom.write_cine(path, 3)
    return path


@pytest.fixture(scope="module")
def predicted(tmp_path_factory, cine):
    """What predict.py writes for the cine."""
    out = tmp_path_factory.mktemp("predictions")
    assert predict.main([str(STUDENT), str(cine), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """app.py in a folder of what a Space gets, but for a smaller limit, a shorter synthetic cine and a warning about
    warned.nii.gz -> (its address, the folder of all its temporary files). At SIGTERM it ends and leaves nothing."""
    folder, temporary = tmp_path_factory.mktemp("app"), tmp_path_factory.mktemp("temporary")
    card = (ROOT / "space" / "README.md").read_text(encoding="utf-8")
    for file in re.search(r"^cp (.+) space/\* runs/space$", card, re.M)[1].split():
        shutil.copy(ROOT / file, folder)
    (folder / "results").mkdir()
    shutil.copy(STUDENT, folder / "results")
    code = (folder / "app.py").read_text(encoding="utf-8")
    warned = "dict(warning='the <b>base</b>') if source.name == 'warned.nii.gz' else {}"
    for here, there in (("MAX_MB, PAGES = 500,", "MAX_MB, PAGES = 3,"), ("cine(source)", "cine(source, 3)"),
                        ("| dict(file=source.name)", f"| dict(file=source.name) | ({warned})")):
        assert here in code
        code = code.replace(here, there)
    (folder / "app.py").write_text(code, encoding="utf-8")
    with open(folder / "stderr", "w+") as stderr:
        process = subprocess.Popen([sys.executable, "app.py", "--no-browser"], cwd=folder, stdout=subprocess.PIPE,
                                   env={**os.environ, "TMPDIR": str(temporary), "HTTP_PROXY": "http://127.0.0.1:9"},
                                   stderr=stderr, text=True)
        try:
            line = process.stdout.readline()                        # the fixture waits as long as the start takes
            stderr.seek(0)
            assert line, stderr.read()
            yield re.match(r"(http://127\.0\.0\.1:\d+/) is the page", line)[1], temporary
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 143
        finally:
            process.kill()
        stderr.seek(0)
        assert "Traceback" not in stderr.read()
    assert not list(temporary.glob("actnet-*"))


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """() -> a page in a browser without a cache; whatever any of them asks for is on this machine."""
    contexts, hosts = [], set()

    def open_one():
        contexts.append(browser.new_context(viewport=dict(width=1280, height=900)))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: hosts.add(urlparse(request.url).hostname))
        page.goto(server[0])
        page.wait_for_selector("#drop input[type=file]", state="attached")
        return page
    yield open_one
    for context in contexts:
        context.close()
    assert hosts - {None} == {"127.0.0.1"}                          # None: data: and blob:


def drop(page, path):
    page.set_input_files("#drop input[type=file]", path)


def wait_for_slice(page):
    page.wait_for_selector("#image img")


def kept(temporary):
    """The files with content below the server's folder."""
    return {p.name for p in temporary.glob("actnet-*/**/*") if p.is_file() and p.stat().st_size}


def shot(page, path):
    page.locator("#image img").screenshot(path=path)
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_a_cine(open_page, server, cine, predicted, tmp_path):
    """Its EF and curve, the slider, the outline, the downloads as predict.py's, on a desktop and a telephone."""
    page = open_page()
    assert evaluate.NOTICE in page.inner_text("body")
    drop(page, cine)
    wait_for_slice(page)
    row, = read_csv(predicted / "predictions.csv")
    text = page.inner_text("#numbers")
    for ventricle in ("lv", "rv"):
        expected = [f"{float(row[f'{ventricle}_{k}']):.1f}" for k in ("edv", "esv", "ef")]
        assert re.search(rf"^{ventricle.upper()}\s+" + r"\s+".join(map(re.escape, expected)), text, re.M)
    assert text.startswith("heart.nii.gz")
    assert f"myocardium {float(row['myo_mass']):.1f} g. ED is frame {row['ED']}, ES frame {row['ES']} of 3." in text
    curve = page.request.get(page.locator("#curve img").get_attribute("src")).body()
    assert curve == (predicted / "heart_volumes.png").read_bytes()
    assert kept(server[1]) == {f"heart_{k}" for k in ("seg.nii.gz", "overlay.png", "volumes.csv", "volumes.png",
                                                      "table.csv")}                        # and no longer the upload
    for label, name in (("Label map (NIfTI)", "heart_seg.nii.gz"), ("Table (CSV)", "heart_table.csv")):
        with page.expect_download() as download:
            page.get_by_text(label).click()
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
    got, expected = (gzip.decompress((p / "heart_seg.nii.gz").read_bytes()) for p in (tmp_path, predicted))
    assert got == expected
    table, = read_csv(tmp_path / "heart_table.csv")
    assert {k: table[k] for k in evaluate.INDICES} == {k: row[k] for k in evaluate.INDICES}

    first = shot(page, tmp_path / "first.png")
    for color in evaluate.COLORS.values():
        assert painted(tmp_path / "first.png", color) > 100
    source = page.locator("#image img").get_attribute("src")
    page.locator("#frame input[type=range]").press("ArrowRight")
    page.wait_for_function("before => document.querySelector('#image img').src != before", arg=source)
    assert np.abs(shot(page, tmp_path / "second.png") - first).mean() > 1
    page.get_by_label("outline").uncheck()
    page.wait_for_function("before => document.querySelector('#image img').src != before",
                           arg=page.locator("#image img").get_attribute("src"))
    shot(page, tmp_path / "bare.png")
    assert painted(tmp_path / "bare.png", evaluate.COLORS["LV"]) < painted(tmp_path / "first.png",
                                                                           evaluate.COLORS["LV"]) / 2
    for width in (1280, 390):
        page.set_viewport_size(dict(width=width, height=844))
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
    blocked = page.evaluate("""() => new Promise(done => {
        document.addEventListener('securitypolicyviolation', event => done(event.blockedURI))
        fetch('https://example.org/').catch(() => setTimeout(done, 5000))})""")
    assert blocked.startswith("https://example.org")                # the browser refuses before it asks
    page.context.close()
    deadline = time.monotonic() + 30
    while kept(server[1]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert kept(server[1]) == set()


def test_bad_files(capsys, monkeypatch, open_page, server, tmp_path):
    """The line of predict.py, in the page, which shows no results; too large a file has a line as well."""
    page = open_page()
    page.get_by_text("Take a synthetic scan").click()
    wait_for_slice(page)
    phantom.write_nifti(tmp_path / "flat.nii.gz", np.ones((90, 80)), (1.5, 1.5))
    monkeypatch.chdir(tmp_path)
    assert predict.main([str(STUDENT), "flat.nii.gz", "--out", "out"]) == 1
    told = capsys.readouterr().err.strip().removeprefix("predict.py: ")
    drop(page, tmp_path / "flat.nii.gz")
    page.wait_for_selector("#message textarea")
    assert page.input_value("#message textarea") == told
    page.wait_for_selector("#image img", state="hidden")
    assert kept(server[1]) == set()
    (tmp_path / "large.nii").write_bytes(bytes(4_000_000))
    page.reload()
    drop(page, tmp_path / "large.nii")
    page.get_by_text(re.compile("maximum.* size")).first.wait_for()


@pytest.mark.parametrize("host", ["192.0.2.1", "nonsense.invalid", "a..b"])
def test_a_host_that_is_not_here(capsys, host):
    import app
    assert app.main(["--host", host, "--no-browser"]) == 2
    one_line(capsys.readouterr().err, f"--host {host}", "give 0.0.0.0")


def test_without_gradio():
    code = "import sys, runpy; sys.modules['gradio'] = None; runpy.run_path('app.py', run_name='__main__')"
    done = python("-c", code, cwd=ROOT)
    assert done.returncode == 2
    one_line(done.stderr, "pip install 'gradio")


def test_two_pages_take_turns(open_page, server, cine):
    """The same file from two pages at once: one waits, both are answered."""
    pages = open_page(), open_page()
    for page in pages:
        drop(page, cine)
    for page in pages:
        wait_for_slice(page)
    texts = {page.inner_text("#numbers") for page in pages}
    assert len(texts) == 1
    assert "heart.nii.gz" not in kept(server[1])


def test_a_volume_with_a_warning(open_page, cine, tmp_path):
    """3D: volumes, no frames, no curve; the warning as text, in plain sight."""
    nifti = nib.load(cine)
    nib.save(nifti.slicer[..., 0], tmp_path / "warned.nii.gz")
    page = open_page()
    drop(page, tmp_path / "warned.nii.gz")
    wait_for_slice(page)
    assert page.input_value("#message textarea") == "the <b>base</b>"
    assert page.locator("#message textarea").is_visible()
    volumes = re.search(r"RV, ml\s+MYO, ml\s+LV, ml\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)", page.inner_text("#numbers"))
    assert all(20 < float(v) < 300 for v in volumes.groups())
    assert page.locator("#slice input[type=range]").is_visible()
    assert not page.locator("#frame").is_visible()
    assert not page.locator("#curve").is_visible()


def test_what_the_header_does_not_tell(capsys, monkeypatch, open_page, cine, tmp_path):
    """A file whose refusal asks for --spacing is segmented with the field filled, with predict.py's volumes; wrong text
    gives predict.py's line; after a success the field is empty and the next file is read by its own header."""
    nifti = nib.load(cine).slicer[..., 0]
    nib.save(nifti, tmp_path / "sound.nii.gz")
    nifti.header.set_zooms((0.008, 0.008, 0.008))                                          # metres, perhaps
    nifti.set_sform(None, 0)
    nifti.set_qform(None, 0)
    nib.save(nifti, tmp_path / "metres.nii.gz")
    monkeypatch.chdir(tmp_path)
    spacing = [f"{mm:g}" for mm in nib.load(cine).header.get_zooms()[2::-1]]

    def tell(expected, *options):
        code = predict.main([str(STUDENT), "metres.nii.gz", "--out", "out", *options])
        assert code == expected
        return capsys.readouterr().err.strip().removeprefix("predict.py: ")

    def refuse(*options):
        with pytest.raises(SystemExit) as end:
            tell(0, *options)
        assert end.value.code == 2
        return capsys.readouterr().err.strip().removeprefix("predict.py: ")
    page = open_page()
    page.get_by_text("The header is wrong or silent").click()
    fields = {name: page.locator(f"#{name} textarea, #{name} input") for name in ("spacing", "axes")}

    def answer(spacing, axes=""):
        fields["spacing"].fill(spacing)
        fields["axes"].fill(axes)
        before = page.input_value("#message textarea") if page.locator("#message textarea").count() else ""
        drop(page, tmp_path / "metres.nii.gz")
        page.wait_for_function("before => { const box = document.querySelector('#message textarea');"
                               " return box && box.value && box.value != before }", arg=before)
        return page.input_value("#message textarea")
    told = answer("")
    assert "--spacing" in told
    assert told == tell(1)
    assert answer("8 1") == refuse("--spacing", "8", "1")
    assert answer("8 a 1") == refuse("--spacing", "8", "a", "1")
    assert answer("8 0 1") == refuse("--spacing", "8", "0", "1")
    assert answer("8 1 1 1") == "argument --spacing: invalid float value: '1 1'; see --help"
    assert answer(" ".join(spacing), "xyy") == refuse("--axes", "xyy")
    assert not page.locator("#image img").count()

    assert tell(0, "--spacing", *spacing, "--axes", "xyz") == ""
    fields["axes"].fill(" xyz ")
    drop(page, tmp_path / "metres.nii.gz")
    wait_for_slice(page)
    row, = read_csv(tmp_path / "out" / "predictions.csv")
    numbers = page.inner_text("#numbers")
    volumes = re.search(r"LV, ml\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)", numbers).groups()
    assert volumes == tuple(f"{float(row[k]):.1f}" for k in predict.ML)
    assert min(map(float, volumes)) > 20
    with page.expect_download() as download:
        page.get_by_text("Label map (NIfTI)").click()
    download.value.save_as(tmp_path / "got.nii.gz")
    got, expected = (gzip.decompress(p.read_bytes()) for p in (tmp_path / "got.nii.gz",
                                                               tmp_path / "out" / "metres_seg.nii.gz"))
    assert got == expected
    assert [field.input_value() for field in fields.values()] == ["", ""]
    drop(page, tmp_path / "sound.nii.gz")
    page.wait_for_function("() => document.querySelector('#numbers').innerText.includes('sound.nii.gz')")
    assert page.inner_text("#numbers") == numbers.replace("metres", "sound")


def test_a_file_is_read_once(cine, monkeypatch, tmp_path):
    """What is shown are the frames that were segmented and their labels: those of the label map."""
    import app
    reads, real = [], predict.read_scan
    monkeypatch.setattr(predict, "read_scan", lambda *a: reads.append(a) or real(*a))
    nets, checkpoint = evaluate.load_networks(STUDENT)
    source = nib.load(cine).slicer[..., 0]
    nib.save(source, tmp_path / "still.nii.gz")
    folder = tempfile.TemporaryDirectory(dir=tmp_path)
    scan = app.segment(nets, checkpoint, tmp_path / "still.nii.gz", folder)
    assert len(reads) == 1
    frames, labels, spacing = scan.shown
    np.testing.assert_array_equal(frames[0], np.asanyarray(source.dataobj).T)
    np.testing.assert_array_equal(labels[0], np.asanyarray(nib.load(f"{scan.stem}_seg.nii.gz").dataobj).T)
    assert labels.max() == 3
    assert spacing == pytest.approx(source.header.get_zooms()[::-1])
