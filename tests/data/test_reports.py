import pytest

from imitate_ds.data.reports import ParsedReport, parse_report

MIMIC = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough  // pneumonia?

 COMPARISON:  Chest radiograph ___.

 FINDINGS:

 The lungs are clear.  The cardiac
 silhouette is normal.

 IMPRESSION:

 No acute cardiopulmonary process.
"""


def test_sections_of_a_common_report():
    expected = ("The lungs are clear. The cardiac silhouette is normal.", "No acute cardiopulmonary process.")
    assert parse_report(MIMIC) == ParsedReport(*expected, "findings and impression")
    assert parse_report(MIMIC, "mit-lcp") == ParsedReport(*expected, "findings and impression")


CASES = {
    "empty findings before impression": ("FINDINGS:\n IMPRESSION: Clear.", "", "Clear.", "impression"),
    "lower case": ("findings:\n clear\nimpression: normal", "clear", "normal", "findings and impression"),
    "title case": ("Findings: Clear.\nImpression: Normal.", "Clear.", "Normal.", "findings and impression"),
    "no blank after the colon": ("FINDINGS:clear\nIMPRESSION:normal", "clear", "normal", "findings and impression"),
    "blank before the colon": ("FINDINGS :clear\nIMPRESSION : normal", "clear", "normal", "findings and impression"),
    "lower case everywhere": (
        "indication: cough\nfindings: clear\ncomparison: none\nimpression: normal",
        "clear",
        "normal",
        "findings and impression",
    ),
    "impression and recommendation": ("IMPRESSION AND RECOMMENDATIONS: CT.", "", "CT.", "impression"),
    "in brackets": ("FINDINGS (AP): Clear.\nIMPRESSION (corrected): Normal.", "Clear.", "Normal.",
                    "findings and impression"),
    "comparison named after a projection": (
        "COMPARISON CHEST X-RAY: The study of ___ was reviewed.\nIMPRESSION: Normal.", "", "Normal.", "impression",
    ),
    "no colon": ("FINDINGS\nclear\nIMPRESSION\nnormal", "clear", "normal", "findings and impression"),
    "ampersand": ("FINDINGS & IMPRESSION: Clear.", "Clear.", "Clear.", "joint header"),
    "and": ("INDICATION: cough\nFINDINGS AND IMPRESSION: Clear.", "Clear.", "Clear.", "joint header"),
    "slash": ("Impression/Findings: Clear.", "Clear.", "Clear.", "joint header"),
    "joint, then an impression": ("FINDINGS AND IMPRESSION: a b\nIMPRESSION: c", "a b", "c", "joint header"),
    "digits": (
        "COMPARISON: None.\nCHEST 2 VIEWS: The lungs are clear.\nIMPRESSION: Normal.",
        "The lungs are clear.", "Normal.", "view header",
    ),
    "digits, findings of their own": (
        "CHEST 2 VIEWS: ___ at 10:30\nFINDINGS: Clear.\nIMPRESSION: Normal.",
        "Clear.", "Normal.", "findings and impression",
    ),
    "digits, findings empty": (
        "FINDINGS:\n CHEST 2 VIEWS: The lungs are clear.", "The lungs are clear.", "", "view header",
    ),
    "digits after the impression": ("IMPRESSION: Normal.\nABDOMEN 1 VIEW: 3/2/2010", "", "Normal.", "impression"),
    "a view that is only dated": ("XR CHEST 2 VIEWS: 12-4-2009\nIMPRESSION: Normal.", "", "Normal.", "impression"),
    "paragraphs of the findings": (
        "FINDINGS:\nLUNGS: Clear.\nCHEST 2 VIEWS: No change.\nHEART: Normal.\nIMPRESSION: Normal.",
        "LUNGS: Clear. CHEST 2 VIEWS: No change. HEART: Normal.", "Normal.", "findings and impression",
    ),
    "header at the very start": ("IMPRESSION: Normal.", "", "Normal.", "impression"),
    "inline": ("FINDINGS: Clear. IMPRESSION: Normal.", "Clear.", "Normal.", "findings and impression"),
    "inline, no full stop": ("FINDINGS: clear IMPRESSION: normal", "clear", "normal", "findings and impression"),
    "inline, title case": ("Findings: Clear. Impression: Normal.", "Clear.", "Normal.", "findings and impression"),
    "all on one line": (
        "EXAM: Chest. COMPARISON: None. FINDINGS: Clear. IMPRESSION: Normal. NOTIFICATION: by telephone",
        "Clear.", "Normal.", "findings and impression",
    ),
    "addendum on top": (
        "ADDENDUM: The impression should read:\nIMPRESSION: Old.\n" + "_" * 60 + "\n FINAL REPORT\n"
        " FINDINGS: Clear.\n IMPRESSION: Normal.",
        "Clear.", "Normal.", "findings and impression",
    ),
    "addendum below": ("IMPRESSION: Normal.\nADDENDUM: Discussed.", "", "Normal.", "impression"),
    "two impressions": ("IMPRESSION: First.\nFINDINGS: Clear.\nIMPRESSION: Last.", "Clear.", "Last.",
                        "findings and impression"),
    "two impressions, the last empty": ("IMPRESSION: First.\nIMPRESSION:\n", "", "First.", "impression"),
    "wet read": (
        "WET READ: ___ 9:12 PM\n  IMPRESSION: Possible pneumonia.\n" + "_" * 80 + "\n"
        "                FINAL REPORT\n FINDINGS: Clear.\n",
        "Clear.", "", "findings",
    ),
    "wet read, nothing final": (
        "WET READ: 9:12 PM\nIMPRESSION: Possible pneumonia.\nFINAL REPORT\n", "", "Possible pneumonia.", "impression",
    ),
    "CRLF": ("FINDINGS:\r\nClear\r\nlungs.\r\n\r\nIMPRESSION:\r\nNormal.\r\n", "Clear lungs.", "Normal.",
             "findings and impression"),
    "blanks kept": ("FINDINGS: ___ is XXXX.\nIMPRESSION: XXXX.", "___ is XXXX.", "XXXX.", "findings and impression"),
    "placeholders": ("FINDINGS: N/A\nIMPRESSION: None", "", "", "no section"),
    "no section at all": ("The lungs are clear.\n\nNo pneumonia.", "", "", "no section"),
    "nothing": ("", "", "", "no section"),
    "words in sentences": (
        "INDICATION: fever, clinical impression: pneumonia\nFINDINGS: No acute findings: clear.\nCLINICAL IMPRESSION: x",
        "No acute findings: clear.", "", "findings",
    ),
    "a view under an empty impression": (
        "FINDINGS: a.\nIMPRESSION:\nPA AND LATERAL CHEST: no acute disease is seen.",
        "a.", "no acute disease is seen.", "findings and impression",
    ),
    "a dated view under an empty impression": (
        "FINDINGS: a.\nIMPRESSION:\nCHEST 2 VIEWS: 12-4-2009\n", "a.", "", "findings",
    ),
    "inline, lower case": ("findings: clear lungs impression: normal", "clear lungs", "normal",
                           "findings and impression"),
    "an impression in a sentence of the findings": (
        "FINDINGS: Unlike the prior impression: clear.\nIMPRESSION: Normal.",
        "Unlike the prior impression: clear.", "Normal.", "findings and impression",
    ),
    "findings named in the impression": (
        "IMPRESSION: Findings: stable. No change.", "", "Findings: stable. No change.", "impression",
    ),
    "findings below an empty impression": ("Impression:\nFindings: Clear.", "Clear.", "", "findings"),
    "wet read, final report without headers": (
        "WET READ: 9:12 PM\nIMPRESSION: Possible pneumonia.\nFINAL REPORT\n The lungs are clear.\n", "", "", "no section",
    ),
    "wet read, final report only signed": (
        "WET READ:\nIMPRESSION: Pneumonia.\nFINAL REPORT\nElectronically signed by Dr Ann Example\n",
        "", "Pneumonia.", "impression",
    ),
    "signed": ("IMPRESSION: Normal.\nElectronically signed by: Dr X\n", "", "Normal.", "impression"),
    "signed, no colon": ("IMPRESSION: Normal\nReport electronically signed by Dr X on ___", "", "Normal", "impression"),
    "signed inline": ("IMPRESSION: Normal. Signed by: Dr X", "", "Normal.", "impression"),
    "attending": ("IMPRESSION: Normal.\nATTENDING RADIOLOGIST: X\nResident: Y", "", "Normal.", "impression"),
    "radiologist": ("IMPRESSION: Normal.\n  Interpreting radiologist : X, M.D.", "", "Normal.", "impression"),
    "a radiologist in a sentence": (
        "IMPRESSION: Edema, told by the\nattending radiologist to Dr X. No effusion.",
        "", "Edema, told by the attending radiologist to Dr X. No effusion.", "impression",
    ),
    "bold": ("**FINDINGS:** clear.\n**Impression**: normal", "clear.", "normal",
             "findings and impression"),
    "line at the end": ("IMPRESSION: Normal.\n__________________\nDictated", "", "Normal.", "impression"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_tolerant(case):
    text, *expected = CASES[case]
    assert parse_report(text) == ParsedReport(*expected)


def test_mit_lcp_takes_the_last_impression_and_both_sections():
    text = " FINDINGS: Clear.\n IMPRESSION: First.\n IMPRESSION: Last.\n"
    assert parse_report(text, "mit-lcp") == ParsedReport("Clear.", "Last.", "findings and impression")


def test_mit_lcp_falls_back_to_the_last_paragraph():
    text = " INDICATION: cough\n\n PA and lateral views.\n \n The lungs are clear.\n"
    assert parse_report(text, "mit-lcp") == ParsedReport("", "The lungs are clear.", "last paragraph")
    assert parse_report("\n", "mit-lcp") == ParsedReport("", "", "no section")


@pytest.mark.parametrize("text", ["findings: clear", "FINDINGS:clear", " FINDINGS & IMPRESSION: clear"])
def test_mit_lcp_does_not_see_what_its_model_does_not_see(text):
    assert parse_report(text, "mit-lcp").rule == "last paragraph"


def test_unknown_style_is_refused():
    with pytest.raises(ValueError, match="style = 'mit': must be 'tolerant' or 'mit-lcp'"):
        parse_report("", "mit")
