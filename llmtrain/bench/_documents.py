"""Documents in a dozen languages with everything that trips tokenizers, made up from a seed."""

from __future__ import annotations

import random

SENTENCES = {
    "ar": "تفتح المكتبة أبوابها في الصباح. يقرأ الأطفال القصص "
    "بصوت عال، ثم يكتبون ما فهموه. كم كتابا قرأت هذا العام؟",
    "de": "Die Bibliothek öffnet um acht. Wer zuerst kommt, sucht sich "
    "den größten Tisch aus. Übermorgen bleibt sie geschlossen!",
    "el": "Η βιβλιοθήκη ανοίγει νωρίς το πρωί. Τα παιδιά διαβάζουν "
    "ιστορίες και μετά γράφουν ό,τι κατάλαβαν. Πόσα βιβλία;",
    "en": "The library opens at eight. Whoever comes first takes the "
    "largest table, and nobody minds. It won't open tomorrow.",
    "es": "La biblioteca abre a las ocho. ¿Quién llegó primero? Mañana "
    "no habrá nadie, según decía el cartel de la señora Núñez.",
    "fr": "La bibliothèque ouvre à huit heures. L'élève arrivé le "
    "premier choisit la table près de la fenêtre. C'était déjà noël.",
    "he": "הספרייה נפתחת בשמונה בבוקר. הילדים קוראים סיפורים ואחר כך כותבים מה שהבינו. כמה ספרים קראת השנה?",
    "hi": "पुस्तकालय सुबह आठ बजे खुलता है। बच्चे कहानियाँ पढ़ते हैं और फिर अपनी समझ लिखते हैं। इस वर्ष आपने कितनी किताबें पढ़ीं?",
    "ja": "図書館は朝八時に開きます。最初に来た人が一番大きな机を選びます。"
    "あしたは休みです。カタカナとひらがなも混ぜておく。",
    "ko": "도서관은 아침 여덟 시에 문을 엽니다. 먼저 온 사람이 가장 "
    "큰 책상을 고릅니다. 내일은 쉽니다. 올해 몇 권을 읽었나요?",
    "pl": "Biblioteka otwiera się o ósmej. Kto przyjdzie pierwszy, "
    "wybiera największy stół. Jutro będzie zamknięta, niestety.",
    "ru": "Библиотека открывается в восемь. Кто пришёл первым, тот "
    "выбирает самый большой стол. Завтра она будет закрыта!",
    "th": "ห้องสมุดเปิดตอนแปดโมงเช้า ใครมาก่อนก็เลือกโต๊ะใหญ่ที่สุดได้ พรุ่งนี้ปิดทำการ ปีนี้คุณอ่านหนังสือไปกี่เล่มแล้ว",
    "tr": "Kütüphane saat sekizde açılıyor. İlk gelen en büyük masayı "
    "seçer. Yarın kapalı olacağını söylediler, ışıklar sönüktü.",
    "vi": "Thư viện mở cửa lúc tám giờ sáng. Ai đến trước thì "
    "được chọn cái bàn lớn nhất. Ngày mai thư viện đóng cửa.",
    "zh": "图书馆早上八点开门。先到的人可以选最大的桌子。"
    "明天休息。今年你读了多少本书？门口的牌子上写得很清楚。",
}
"""A few sentences of our own a language (ISO 639-1)."""

TRAPS = (
    "<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "<0x00>", "\u2581", "\u2581\u2581word", " \u2581 ",
    "\x00", "a\x00b", "\r\n", "\n\n\n", "\r", "\t\t", "  ", " " * 17, "\u00a0", "\u3000", "\u200b",
    "\ufeff", "\ufdd0", "\ufdd1", "\ufdd0\ufdd1", "😀", "👩‍👩‍👧‍👦", "🇩🇪🇫🇷", "e\u0301",
    "\u1e9b\u0323", "ﬁ", "Å", "１２３", "0123456789", "3.14e-10", "http://a.b/c?d=e&f=%20",
    "#!/bin/sh", "def f(x):\n    return x  # \u2581", "\U0010ffff", "\ud7ff", "----====", "\\n",
)  # fmt: skip
"""Control pieces as text, the mark that SentencePiece writes for a space, line ends and spaces of many
kinds, characters that combine or join."""


def documents(count: int, *, seed: int) -> list[str]:
    """`count` documents, each of one language, languages in turn."""
    drawn = random.Random(seed)
    words = {language: text.split(" ") for language, text in SENTENCES.items()}
    languages = sorted(SENTENCES)
    return [_document(drawn, words[languages[number % len(languages)]]) for number in range(count)]


def _document(drawn: random.Random, words: list[str]) -> str:
    parts: list[str] = []
    for _ in range(drawn.randint(0, 60)):
        kind = drawn.random()
        if kind < 0.12:
            parts.append(drawn.choice(TRAPS))
        elif kind < 0.3:
            word = drawn.choice(words)  # cut anywhere: words that no training text held
            parts.append(word[drawn.randrange(len(word) + 1) :])
        else:
            parts.append(drawn.choice(words))
        parts.append(drawn.choice((" ", " ", " ", " ", "", "\n", "  ")))
    return "".join(parts)
