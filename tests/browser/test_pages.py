"""Pages in a real browser (`make test-browser`)."""

import pytest

from kvpolicy.page.themes import DARK, LIGHT

pytestmark = [pytest.mark.browser, pytest.mark.vllm]

NAMES = ("replay", "eval", "demo", "sweep")
THEMES = {"light": LIGHT, "dark": DARK}

PLACES = {
    "replay": ["Policies", "Budgets", "Over the sequence", "Lost by age", "Layers and heads"],
    "eval": ["Policies", "Quality", "By position, 256", "Text", "Ledger", "Replay"],
    "demo": ["Policies", "Pass keys", "Text", "Ledger", "Replay", "Budgets", "Retained set"],
    "sweep": ["t.kvtrace", "ppl, 256 tokens, bundled"],
}
"""What each table of contents has at least."""

FOCUSABLE = "a[href], summary, [tabindex='0']"

IN_ORDER = f"""() => [...document.querySelectorAll("{FOCUSABLE}")]
    .filter(x => x.checkVisibility()).map(x => x.outerHTML.slice(0, 200))"""

FOCUSED = """() => {
    const at = document.activeElement, style = getComputedStyle(at);
    return {what: at.outerHTML.slice(0, 200), outline: parseFloat(style.outlineWidth),
            isShown: style.outlineStyle !== 'none'};
}"""


@pytest.mark.parametrize("scheme", THEMES)
@pytest.mark.parametrize("name", NAMES)
def test_page_opens_without_a_word_or_a_request(name, scheme, visitor, pages) -> None:
    """Nothing on the console, no error, no address asked for, and every picture is drawn."""
    with visitor.visit(pages[name], scheme) as found:
        pictures = found.page.locator("img")
        assert pictures.count() >= (2 if name == "sweep" else 5)
        assert pictures.evaluate_all("all => all.every(x => x.complete && x.naturalWidth > 500)")
        assert found.said == []
        assert found.asked == []


@pytest.mark.parametrize("name", NAMES)
def test_contents_lead_to_sections_that_can_be_seen(name, visitor, pages) -> None:
    """Each entry scrolls its section into view; each section has words, and no empty picture."""
    with visitor.visit(pages[name]) as found:
        links = found.page.get_by_role("navigation").get_by_role("link")
        assert {*PLACES[name]} <= {*links.all_inner_texts()}
        assert links.count() == found.page.locator("section").count()
        for link in links.all():
            link.click()
            section = found.page.locator(link.get_attribute("href"))
            heading = section.get_by_role("heading", level=2)
            top = heading.bounding_box()["y"]
            is_last = found.page.evaluate(
                "() => scrollY + innerHeight >= document.documentElement.scrollHeight - 1"
            )
            assert 0 <= top < 900 if is_last else 0 <= top < 120
            assert len(section.inner_text()) > 80
        boxes = [image.bounding_box() for image in found.page.locator("img").all()]
        assert all(box["width"] > 500 and box["height"] > 150 for box in boxes)


@pytest.mark.parametrize("scheme", THEMES)
@pytest.mark.parametrize("name", NAMES)
def test_page_follows_the_reader_s_colours(name, scheme, visitor, pages) -> None:
    """Paper, ink and pictures are those of the scheme that the reader prefers."""
    with visitor.visit(pages[name], scheme) as found:
        body = "getComputedStyle(document.body)"
        theme = THEMES[scheme]
        assert found.page.evaluate(f"{body}.backgroundColor") == rgb(theme.paper)
        assert found.page.evaluate(f"{body}.color") == rgb(theme.ink)
        corners = found.page.locator("img").evaluate_all(
            """all => all.map(x => {
                const canvas = document.createElement('canvas'), pen = canvas.getContext('2d');
                pen.drawImage(x, 0, 0);
                return 'rgb(' + [...pen.getImageData(1, 1, 1, 1).data].slice(0, 3).join(', ') + ')';
            })"""
        )
        assert {*corners} == {rgb(theme.paper)}


@pytest.mark.parametrize("scheme", THEMES)
@pytest.mark.parametrize("name", [*NAMES, "hostile"])
def test_axe_finds_nothing(name, scheme, visitor, pages) -> None:
    """Roles, names, landmarks, headings, tables and contrast hold, with everything opened."""
    from axe_playwright_python.sync_playwright import Axe

    with visitor.visit(pages[name], scheme) as found:
        found.page.locator("details").evaluate_all("all => all.forEach(x => x.open = true)")
        result = Axe().run(found.page).response
        assert [(x["id"], x["nodes"][0]["html"]) for x in result["violations"]] == []


@pytest.mark.parametrize("name", NAMES)
def test_keyboard_reaches_everything_in_order(name, visitor, pages) -> None:
    """Tab goes through links, pictures' numbers and tables as they stand, each one outlined."""
    with visitor.visit(pages[name]) as found:
        expected = found.page.evaluate(IN_ORDER)
        assert "Skip to the report" in expected[0]
        visited = []
        for _ in expected:
            found.page.keyboard.press("Tab")
            at = found.page.evaluate(FOCUSED)
            assert at["isShown"], at
            assert at["outline"] >= 2, at
            visited.append(at["what"])
        assert visited == expected


def test_skip_link_leads_past_the_contents(visitor, pages) -> None:
    """It shows when it is focused, and the next stop after it lies in the report."""
    with visitor.visit(pages["replay"]) as found:
        skip = found.page.get_by_role("link", name="Skip to the report")
        assert skip.bounding_box()["y"] < 0
        found.page.keyboard.press("Tab")
        assert skip.bounding_box()["y"] >= 0
        found.page.keyboard.press("Enter")
        found.page.keyboard.press("Tab")
        assert found.page.evaluate("() => !!document.activeElement.closest('main')")


def test_numbers_of_a_picture_open_by_keyboard(visitor, pages) -> None:
    """The space bar opens the table beside a picture, and closes it."""
    with visitor.visit(pages["replay"]) as found:
        summary = found.page.get_by_text("The numbers of this picture").first
        table = found.page.get_by_role("table", name="Mean retained mass", exact=True)
        summary.focus()
        found.page.keyboard.press("Space")
        assert table.is_visible()
        found.page.keyboard.press("Space")
        assert not table.is_visible()


@pytest.mark.parametrize("name", NAMES)
def test_landmarks_and_pictures_have_names(name, visitor, pages) -> None:
    """What a screen reader lists: four landmarks, a region per section, pictures with words."""
    with visitor.visit(pages[name]) as found:
        for role in ("banner", "navigation", "main", "contentinfo"):
            assert found.page.get_by_role(role).count() == 1, role
        for heading in found.page.get_by_role("heading", level=2).all()[1:]:
            title = heading.inner_text()
            assert found.page.get_by_role("region", name=title, exact=True).count() >= 1
        named = [image.get_attribute("alt") for image in found.page.get_by_role("img").all()]
        assert len([words for words in named if words]) >= found.page.locator("img").count()


@pytest.mark.parametrize("name", [*NAMES, "hostile"])
@pytest.mark.parametrize("width", [360, 800, 1600])
def test_page_is_never_wider_than_the_window(name, width, visitor, pages) -> None:
    """Only tables scroll sideways, in their own frames, with everything opened."""
    with visitor.visit(pages[name], width=width) as found:
        found.page.locator("details").evaluate_all("all => all.forEach(x => x.open = true)")
        assert found.page.evaluate("document.documentElement.scrollWidth") <= width


def test_hostile_text_stays_text(visitor, pages) -> None:
    """Markup in a model's name, a policy and a prompt is read, not obeyed."""
    with visitor.visit(pages["hostile"]) as found:
        assert found.page.title().endswith("kvpolicy replay")
        assert "owned" in found.page.get_by_role("heading", level=1).inner_text()
        assert found.page.locator("script, [onerror]").count() == 0
        assert found.said == []
        assert found.asked == []


def test_policy_forbids_what_the_page_does_not_need(visitor, pages) -> None:
    """Had anything slipped in, the browser would refuse to run or to fetch it."""
    with visitor.visit(pages["replay"]) as found:
        refused = found.page.evaluate(
            """() => new Promise(done => {
                const found = [];
                document.addEventListener('securitypolicyviolation', event => {
                    found.push(event.effectiveDirective);
                    if (found.length === 3) done(found);
                });
                new Image().src = 'http://127.0.0.1:9/x.png';
                fetch('http://127.0.0.1:9/').catch(() => null);
                const script = document.createElement('script');
                script.textContent = 'document.title = 1';
                document.body.append(script);
            })"""
        )
        assert {*refused} == {"img-src", "connect-src", "script-src-elem"}


def rgb(colour: str) -> str:
    """Six hexadecimal digits as browsers write colours."""
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"
